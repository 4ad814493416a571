"""A table as data, shown in a terminal by rich and in a page as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dilated_attention_pytorch.errors import InvalidInput

if TYPE_CHECKING:
    import rich.table

_NUMBER = re.compile(r"[-+±~]?\d|$")
"""What a cell of a column of numbers starts with; it may be empty."""


@dataclass(frozen=True)
class Table:
    """Rows of text under `columns`, those of numbers right-aligned but for the first; `note` stands below.

    `strong` numbers the rows to stress. Raises InvalidInput when a row has more or fewer cells than there are columns.

    >>> table = Table("Speed", ("what", "GFLOP/s"), (("forward", "98"),))
    >>> table.to_html().startswith("<figure>"), table.to_rich().row_count
    (True, 1)
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    strong: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Check the shape."""
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InvalidInput(f"table {self.title!r}: expected {len(self.columns)} cells in a row, got {row!r}")

    def to_rich(self) -> rich.table.Table:
        """The table for a rich console; nothing in it is read as markup."""
        import rich.box
        import rich.table
        from rich.text import Text

        table = rich.table.Table(
            title=Text(self.title, style="bold"),
            title_justify="left",
            caption=Text(self.note, style="dim") if self.note else None,
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for index, column in enumerate(self.columns):
            numbers = index > 0 and all(_NUMBER.match(row[index]) for row in self.rows)
            table.add_column(Text(column), justify="right" if numbers else "left", overflow="fold")
        for number, row in enumerate(self.rows):
            table.add_row(*(Text(cell) for cell in row), style="bold" if number in self.strong else None)
        return table

    def to_markdown(self) -> str:
        """The table in Markdown with its note below; the title is the page's to give.

        >>> print(Table("Speed", ("what", "GFLOP/s"), (("a|b", "98"),)).to_markdown(), end="")
        | what | GFLOP/s |
        |---|---|
        | a\\|b | 98 |
        """
        lines = [self.columns, *self.rows]
        cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        cells.insert(1, "|---" * len(self.columns) + "|")
        return "\n".join(cells) + "\n" + (f"\n{self.note}\n" if self.note else "")

    def to_html(self) -> str:
        """The table as an HTML figure, every cell escaped."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr{' class=strong' if number in self.strong else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for number, row in enumerate(self.rows)
        )
        note = f"<figcaption>{html.escape(self.note)}</figcaption>" if self.note else ""
        return (
            f"<figure><div class=scroll><table><caption>{html.escape(self.title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}</figure>"
        )
