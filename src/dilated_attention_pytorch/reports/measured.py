"""Tables in Markdown pages that are drawn from stored results: between a mark that names them and an end mark.

``<!-- table: amd-epyc/sparse -->`` stands for the first table of ``sparse.json`` in the folder ``amd-epyc`` below
`benchmarks/results`, ``<!-- table: amd-epyc/selectors 2 -->`` for the second of ``selectors.json``.
"""

from __future__ import annotations

import re
from pathlib import Path

from dilated_attention_pytorch.benchmark.run import STUDIES
from dilated_attention_pytorch.errors import InvalidInput
from dilated_attention_pytorch.reports.tables import Table
from dilated_attention_pytorch.training.files import read_json

_MARK = re.compile(r"(<!-- table: ([\w.-]+)/(\w+)(?: (\d+))? -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def filled_page(text: str, root: Path) -> str:
    """The page with every marked table drawn anew from the results below ``root``.

    A table whose results are not there says how to measure them. Raises InvalidInput for a page without marks, and for
    a mark that names no known results.
    """
    filled, found = _MARK.subn(lambda match: match[1] + _table(root, match[2], match[3], match[4]) + match[6], text)
    if found == 0:
        raise InvalidInput(
            "expected a page with marks such as <!-- table: amd-epyc/sparse --> ... <!-- end of table -->"
        )
    return filled


def _table(root: Path, device: str, study: str, number: str | None) -> str:
    if study not in STUDIES:
        raise InvalidInput(f"the page asks for a table of {study!r}; expected one of {', '.join(STUDIES)}")
    path = root / device / f"{study}.json"
    if not path.is_file():
        return f"Not measured yet: `dilated-attention bench --only {study}`.\n"
    results = read_json(path)
    tables = STUDIES[study].tables(results)
    place = int(number or 1)
    if not 1 <= place <= len(tables):
        raise InvalidInput(f"the page asks for table {place} of {study!r}, which has {len(tables)}")
    versions = results["versions"]
    about = (
        f"{results['device']} ({results['cpu capability']}), {results['system']}, Python {versions['python']}, torch "
        f"{versions['torch']}, float32, {results['rounds']} rounds.\n\n"
    )
    return about + Table(*tables[place - 1]).to_markdown()
