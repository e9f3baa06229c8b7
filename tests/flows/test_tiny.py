"""The real pipeline at its smallest: every stage happens, is kept, and is made again only when it must be."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanochat_core import store

ROWS = [
    "assets",
    "shards_head",
    "shards",
    "tokenizer",
    "tokenizer_eval",
    "pretrain",
    "base_loss",
    "base_eval",
]
ROWS += ["mid", "mid_eval", "sft", "sft_eval", "rl", "rl_eval", "export", "report"]


def nanochat(base: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words, "--base-dir", str(base)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PREFECT_API_URL": "", "PREFECT_HOME": str(base.parent / "prefect")},
    )


def plan(base: Path, *options: str) -> dict[str, Any]:
    done = nanochat(base, "plan", "tiny", *options, "--json")
    assert done.returncode == 0, done.stderr
    stages: dict[str, Any] = json.loads(done.stdout)["stages"]
    return {name: stage for name, stage in stages.items() if stage["state"] != "hit"}


def weights(base: Path, row: str) -> str:
    (path,) = base.glob(f"{row}/*/model.safetensors")
    return store.sha256(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory in which `tiny` has run once."""
    found = tmp_path_factory.mktemp("tiny") / "base"
    done = nanochat(found, "run", "tiny")
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1].removeprefix("report: "))
    assert report.name == "report.md" and report.is_file()
    return found


def test_every_row_of_the_table_has_its_artefact_and_the_report_its_numbers(base: Path) -> None:
    for row in ROWS:
        (directory,) = (base / row).iterdir()
        assert store.verify(directory, base, hashes=True) is not None
    (record,) = base.glob("report/*/result.json")
    metrics = json.loads(record.read_text())["metrics"]
    wanted = {"base/val_bpb_start", "base/val_bpb", "base/core", "mid/chatcore", "sft/chatcore"}
    assert wanted | {"rl/reward_start", "rl/reward", "sft/capitals"} <= set(metrics)
    assert metrics["base/val_bpb"] < metrics["base/val_bpb_start"]


def test_the_same_command_again_trains_nothing(base: Path) -> None:
    begin = time.monotonic()
    done = nanochat(base, "run", "tiny")
    assert done.stderr == f"cached     {', '.join(ROWS)}\n"
    assert time.monotonic() - begin < 10


def test_a_changed_recipe_runs_what_follows_only(base: Path) -> None:
    changed = plan(base, "--set", "sft.steps=5")
    assert list(changed) == ["sft", "sft_eval", "rl", "rl_eval", "export", "report"]
    assert changed["sft"]["why"] == "sft.steps: 12 -> 5"


@pytest.mark.slow
@pytest.mark.parametrize("row", ["tokenizer", "pretrain", "mid", "sft_eval"])
def test_a_lost_artefact_is_made_again_alone_and_comes_out_the_same(base: Path, row: str) -> None:
    (directory,) = (base / row).iterdir()
    before = json.loads((directory / "result.json").read_text())
    shutil.rmtree(directory)
    assert list(plan(base)) == [row]
    assert nanochat(base, "stage", row, "tiny").returncode == 0
    after = json.loads((directory / "result.json").read_text())
    assert store.content(after) == store.content(before)
    assert plan(base) == {}


@pytest.mark.slow
@pytest.mark.parametrize("row", ["pretrain", "mid", "sft", "rl"])
def test_a_training_stage_killed_with_all_its_processes_ends_in_the_same_weights(
    base: Path, row: str
) -> None:
    undisturbed = weights(base, row)
    (directory,) = (base / row).iterdir()
    shutil.rmtree(directory)
    command = [sys.executable, "-m", "flows.cli", "stage", row, "tiny", "--base-dir", str(base)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        deadline = time.monotonic() + 60
        while not list(directory.glob("checkpoints/step_????????")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child = json.loads((directory / "attempts.jsonl").read_text().splitlines()[-1])["pid"]
        os.kill(child, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
    assert list(plan(base)) == [row] and plan(base)[row]["state"] == "resume"
    assert nanochat(base, "stage", row, "tiny").returncode == 0
    assert weights(base, row) == undisturbed
    assert plan(base) == {}
