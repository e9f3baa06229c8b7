"""A view over finished jobs, read from their directories: what was run, what it gained, how long it took."""

from nanochat_core.report.collect import collect, headline_metrics, task_table
from nanochat_core.report.curves import curve_png, curve_svg, read_rows
from nanochat_core.report.pages import (
    Curve,
    Report,
    ReportTable,
    number,
    signed,
    to_html,
    to_markdown,
    write_report,
)
from nanochat_core.report.rows import Finished, read_finished

__all__ = [
    "Curve",
    "Finished",
    "Report",
    "ReportTable",
    "collect",
    "curve_png",
    "curve_svg",
    "headline_metrics",
    "number",
    "read_finished",
    "read_rows",
    "signed",
    "task_table",
    "to_html",
    "to_markdown",
    "write_report",
]
