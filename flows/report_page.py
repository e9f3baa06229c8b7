"""The report as an artefact in Prefect's UI; the disk has the whole one, with its pictures."""

import re
from pathlib import Path

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

PICTURE = re.compile(r"\*\*[^*\n]+\*\*\n\n!\[[^]]*\]\([^)]*\)\n\n")


def publish_report(directory: Path) -> None:
    """Show a finished report's text. A server that is away goes without: the run is done all the same."""
    try:
        text = PICTURE.sub("", (directory / "report.md").read_text())
        text += f"\nThe curves, and all of it on one page: `{directory / 'report.html'}`\n"
        create_markdown_artifact(text, key="report", description="What was run and what it came to")
    except Exception as error:
        get_run_logger().warning(f"the report is in {directory}, but was not published: {error}")
