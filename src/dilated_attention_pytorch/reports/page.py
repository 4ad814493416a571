"""One HTML page that opens without a network: styles and images are inside it, and every text is escaped."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dilated_attention_pytorch.reports.tables import Table

STYLE = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #d9dee4; --back: #ffffff; --shade: #f5f7f9; --mark: #0b6bcb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #39424c; --back: #15191e; --shade: #1e242b; --mark: #6cb2ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 44rem; }
.lead { color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.4rem 0; }
.facts div { background: var(--shade); border-radius: .5rem; padding: .7rem .9rem; }
.facts b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
figure { margin: 1.2rem 0; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; max-width: 44rem; }
img { max-width: 100%; height: auto; border-radius: .5rem; background: #ffffff; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem; }
th, td { text-align: right; padding: .3rem .9rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: .88rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.strong td { font-weight: 700; color: var(--mark); }
pre { background: var(--shade); border-radius: .5rem; padding: 1rem; font-size: .85rem; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--soft); font-weight: 400; }
"""


@dataclass(frozen=True)
class Facts:
    """Large figures, each with a few words: (value, words) pairs."""

    items: Sequence[tuple[str, str]]

    def to_html(self) -> str:
        """The figures side by side."""
        cells = (
            f"<div><b>{html.escape(value)}</b><span>{html.escape(words)}</span></div>" for value, words in self.items
        )
        return f"<div class=facts>{''.join(cells)}</div>"


@dataclass(frozen=True)
class Heading:
    """A section begins."""

    text: str

    def to_html(self) -> str:
        """The heading."""
        return f"<h2>{html.escape(self.text)}</h2>"


@dataclass(frozen=True)
class Paragraph:
    """A few sentences."""

    text: str

    def to_html(self) -> str:
        """The paragraph."""
        return f"<p>{html.escape(self.text)}</p>"


@dataclass(frozen=True)
class Picture:
    """A PNG file, put into the page; `words` describe it to those who cannot see it."""

    path: Path
    words: str

    def to_html(self) -> str:
        """The image as a data URL."""
        data = base64.b64encode(self.path.read_bytes()).decode("ascii")
        return f'<figure><img alt="{html.escape(self.words)}" src="data:image/png;base64,{data}"></figure>'


@dataclass(frozen=True)
class Listing:
    """Text as it is, in a fixed-width font; `given` stands before it in grey."""

    text: str
    given: str = ""

    def to_html(self) -> str:
        """The text, escaped."""
        return f"<pre><b>{html.escape(self.given)}</b>{html.escape(self.text)}</pre>"


Part = Facts | Heading | Paragraph | Picture | Listing | Table


def page(title: str, lead: str, parts: Sequence[Part]) -> str:
    """The whole page as HTML.

    >>> page("A <title>", "what it is", [Paragraph("1 < 2")]).count("&lt;")
    3
    """
    heading = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{heading}</title><style>{STYLE}</style></head>\n"
        f'<body><main><h1>{heading}</h1><p class="lead">{html.escape(lead)}</p>\n'
        + "\n".join(part.to_html() for part in parts)
        + "\n</main></body></html>\n"
    )
