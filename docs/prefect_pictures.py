"""Takes the pictures of Prefect's UI in docs/prefect/ while a real run is at work.

    uv run python docs/prefect_pictures.py [--profile tiny] [--out docs/prefect]

Starts a server, worker and reconciler of its own in a temporary directory, as `nanochat up` does, and the
profile's deployment on them. Wants Chromium; nothing leaves this machine.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from browser import chromium
from playwright.sync_api import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from machine import Machine, until

AT_WORK = "mid"  # the stage during which the pictures are taken: some are done, some are to come


def settled(page: Page, address: str) -> None:
    """The page once it has drawn what it asked the server for; it goes on asking, so there is no idle net."""
    page.goto(address)
    page.wait_for_selector("main, .p-layout-default, #app")
    page.wait_for_timeout(5000)


def take(page: Page, machine: Machine, run: str, out: Path) -> None:
    ui = machine.api.removesuffix("/api")
    settled(page, f"{ui}/runs/flow-run/{run}")
    page.screenshot(path=out / "run.png")
    page.get_by_text("Task Runs", exact=True).last.click()
    page.wait_for_timeout(3000)
    page.screenshot(path=out / "task-runs.png")
    wanted = {"artifacts": {"flow_run_id": {"any_": [run]}}, "sort": "CREATED_DESC", "limit": 200}
    made = {artifact["key"]: artifact["id"] for artifact in machine.ask("artifacts/filter", wanted)}
    for key in ("pretrain-progress", "pretrain-curve"):
        settled(page, f"{ui}/artifacts/artifact/{made[key]}")
        page.screenshot(path=out / f"{key}.png")
    deployment = machine.ask("deployments/name/speedrun/cpu-demo")["id"]
    settled(page, f"{ui}/deployments/deployment/{deployment}/run")
    page.screenshot(path=out / "start.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "prefect")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="nanochat-pictures-"))
    machine = Machine(root, OMP_NUM_THREADS="2")
    try:
        machine.up()
        run = machine.start(options.profile)
        if until(lambda: machine.stage() == AT_WORK, 1800) is None:
            raise SystemExit(f"{AT_WORK} did not begin: {machine.state(run)}")
        with chromium(parser) as browser:
            page = browser.new_page(viewport={"width": 1440, "height": 960})
            take(page, machine, run, options.out)
            until(lambda: machine.state(run)["type"] in ("COMPLETED", "FAILED", "CRASHED"), 1800, every=2)
            print(machine.state(run)["name"])
            settled(page, f"{machine.api.removesuffix('/api')}/runs/flow-run/{run}")
            page.screenshot(path=options.out / "done.png")
    finally:
        machine.down()
        machine.power_cut()
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
