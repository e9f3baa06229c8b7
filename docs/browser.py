"""The browser that takes the project's pictures: Debian's Chromium, driven by Playwright."""

import argparse
import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Browser, sync_playwright


@contextlib.contextmanager
def chromium(parser: argparse.ArgumentParser) -> Iterator[Browser]:
    """A headless Chromium; the command ends with a sentence where there is none."""
    found = shutil.which("chromium")
    if found is None:
        parser.error("Chromium is not installed; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
