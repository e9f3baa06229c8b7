"""What a report is made of, and its two renderings: Markdown, and one HTML file that needs no other."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Metrics

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 62rem; margin: 2.5rem auto; }
body { padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #dde2ea; padding-bottom: .3rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #e6eaf0; text-align: right; }
th, td { white-space: nowrap; vertical-align: top; } .words { text-align: left; }
td.words:last-child { white-space: normal; } th { color: #5a6675; font-weight: 600; }
pre { background: #f5f7fa; padding: .8rem 1rem; border-radius: 6px; }
pre { font-size: .85rem; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; }
summary { cursor: pointer; color: #33507a; } .wide { overflow-x: auto; }
"""


class Text(NamedTuple):
    text: str


class ReportTable(NamedTuple):
    """The first `names` columns and the last `words` ones hold text; what lies between is numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 0
    names: int = 1


class Curve(NamedTuple):
    name: str
    svg: str


class Quote(NamedTuple):
    """Something long that the HTML folds away under its title."""

    title: str
    text: str


Block = Text | ReportTable | Curve | Quote


@dataclass(frozen=True)
class Report:
    """Headings with what stands under them, and the numbers a program reads."""

    title: str
    sections: Sequence[tuple[str, Sequence[Block]]]
    metrics: Metrics


def write_report(report: Report, directory: Path) -> None:
    """report.md, report.html (one file that needs no other) and the curves that report.md shows."""
    for _, blocks in report.sections:
        for block in blocks:
            if isinstance(block, Curve):
                (directory / "curves").mkdir(exist_ok=True)
                store.write_whole(directory / "curves" / f"{block.name}.svg", block.svg)
    store.write_whole(directory / "report.md", to_markdown(report))
    store.write_whole(directory / "report.html", to_html(report))


def to_markdown(report: Report) -> str:
    parts = [f"# {report.title}"]
    for heading, blocks in report.sections:
        parts.append(f"## {heading}")
        for block in blocks:
            match block:
                case Text(text):
                    parts.append(text)
                case ReportTable(head, rows, words, names):
                    numbers = range(names, len(head) - words)
                    align = ["---:" if i in numbers else "---" for i in range(len(head))]
                    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, align, *rows]]
                    parts.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
                case Curve(name, _):
                    parts.append(f"**{name}**\n\n![{name}](curves/{name}.svg)")
                case Quote(title, text):
                    parts.append(f"**{title}**\n\n" + "\n".join(f"    {line}" for line in text.splitlines()))
    return "\n\n".join(parts) + "\n"


def to_html(report: Report) -> str:
    parts = [f"<h1>{html.escape(report.title)}</h1>"]
    for heading, blocks in report.sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for block in blocks:
            match block:
                case Text(text):
                    parts.append(f"<p>{html.escape(text)}</p>")
                case ReportTable():
                    parts.append(html_table(block))
                case Curve(name, svg):
                    parts.append(f"<h3>{html.escape(name)}</h3>{svg}")
                case Quote(title, text):
                    parts.append(
                        f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"
                    )
    head = f'<meta charset="utf-8"><title>{html.escape(report.title)}</title><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def number(value: float | int | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4f}"


def html_table(table: ReportTable) -> str:
    numbers = range(table.names, len(table.head) - table.words)

    def line(cells: Sequence[str], tag: str) -> str:
        found = [
            f"<{tag}{'' if i in numbers else ' class=words'}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(found)}</tr>"

    top = f"<thead>{line(table.head, 'th')}</thead>" if any(table.head) else ""
    body = "".join(line(row, "td") for row in table.rows)
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'
