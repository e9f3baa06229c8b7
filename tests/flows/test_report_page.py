"""The report of a whole run, in a browser: complete in itself, fitting, and every number one of a result."""

import json
import re
import shutil
from pathlib import Path

import pytest

from nanochat_core import report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CHROMIUM = shutil.which("chromium")


def results(base: Path) -> dict[str, dict[str, object]]:
    jobs = json.loads((base / "runs" / "latest.json").read_text())["jobs"]
    return {row: json.loads((base / row / name / "result.json").read_text()) for row, name in jobs.items()}


def test_every_number_of_a_whole_runs_tables_is_one_of_its_results(tiny_base: Path) -> None:
    found = results(tiny_base)
    metrics = found["report"]["metrics"]
    assert isinstance(metrics, dict)
    for key, row in (("base/val_bpb", "base_loss"), ("base/core", "base_eval"), ("rl/reward", "rl")):
        own = found[row]["metrics"]
        assert isinstance(own, dict) and metrics[key] == own[key.partition("/")[2]]
    evals = {"mid_eval": "mid", "sft_eval": "sft", "rl_eval": "rl"}
    for row, model in evals.items():
        own = found[row]["metrics"]
        assert isinstance(own, dict) and own
        for task, value in own.items():
            if isinstance(value, int | float):
                assert metrics[f"{model}/{task}"] == value
    (path,) = (tiny_base / "report").glob("*/report.md")
    text = path.read_text().partition("## BASE, MID, SFT and RL")[2].partition("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = {"CORE (own tasks)": "core", "ChatCORE": "chatcore", "bits per byte": "val_bpb"}
        task = names.get(cells[0], cells[0])
        if len(cells) == 6 and any(f"{model}/{task}" in metrics for model in ("base", "mid", "sft", "rl")):
            for model, cell in zip(("base", "mid", "sft", "rl"), cells[1:5], strict=True):
                assert cell in ("", report.number(metrics.get(f"{model}/{task}"))), line
    assert text.count("\n|") > 5


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")
def test_the_page_is_whole_in_a_browser_and_asks_the_net_for_nothing(tiny_base: Path) -> None:
    from playwright.sync_api import sync_playwright

    (path,) = (tiny_base / "report").glob("*/report.html")
    asked: list[str] = []
    said: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(path.as_uri())
        assert page.evaluate(
            "document.documentElement.scrollWidth <= innerWidth"
        )  # tables scroll by themselves
        headings = page.locator("h2").all_inner_texts()
        pictures = page.locator("svg").count()
        heights = page.evaluate(
            "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)"
        )
        browser.close()
    assert asked == [path.as_uri()] and said == []
    assert headings[:3] == ["What it came to", "BASE, MID, SFT and RL", "Beside published runs"]
    assert pictures >= 4 and min(heights) > 50
    assert not re.search(r"<script", path.read_text())
