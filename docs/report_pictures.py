"""Takes the pictures in docs/report/ of a finished run's report: its first tables, and one stage's curves.

    uv run python docs/report_pictures.py REPORT_HTML [--stage pretrain] [--out docs/report]

`nanochat run` ends with the report's path. Wants Chromium; nothing leaves this machine.
"""

import argparse
from pathlib import Path

from browser import chromium
from playwright.sync_api import Page

WIDTH = 900
END = "h2:has-text('task by task')"  # of the first tables


def take(page: Page, stage: str, out: Path) -> None:
    box = page.locator(END).bounding_box()
    assert box is not None
    top = {"x": 0, "y": 0, "width": WIDTH, "height": int(box["y"]) - 20}
    page.screenshot(path=out / "report.png", full_page=True, clip=top)
    page.locator(f"h3:text-is('{stage}') + svg").screenshot(path=out / "curves.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path)
    parser.add_argument("--stage", default="pretrain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "report")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with chromium(parser) as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": 800})
        page.goto(options.report.resolve().as_uri())
        take(page, options.stage, options.out)


if __name__ == "__main__":
    main()
