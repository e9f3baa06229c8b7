"""The real pipeline at its smallest: every stage happens, is kept, and is made again only when it must be."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from toys import Command

from nanochat_core.artifacts import store

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
        [sys.executable, "-m", "nanochat_core.cli.main", *words, "--base-dir", str(base)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PREFECT_API_URL": "", "PREFECT_HOME": str(base.parent / "prefect")},
    )


def to_do(done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    stages: dict[str, Any] = json.loads(done.stdout)["stages"]
    return {name: stage for name, stage in stages.items() if stage["state"] != "hit"}


def test_every_row_of_the_table_has_its_artefact_and_the_report_its_numbers(tiny_base: Path) -> None:
    for row in ROWS:
        (directory,) = (tiny_base / row).iterdir()
        assert store.verify(directory, tiny_base, hashes=True) is not None
    (record,) = tiny_base.glob("report/*/result.json")
    metrics = json.loads(record.read_text())["metrics"]
    wanted = {"base/val_bpb_start", "base/val_bpb", "base/core", "mid/chatcore", "sft/chatcore"}
    assert wanted | {"rl/reward_start", "rl/reward", "sft/capitals"} <= set(metrics)
    assert metrics["base/val_bpb"] < metrics["base/val_bpb_start"]


def test_the_same_command_again_trains_nothing(command: Command, tiny_copy: Path) -> None:
    done = command("run", "tiny", "--base-dir", str(tiny_copy))
    assert done.stderr == f"cached     {', '.join(ROWS)}\n"


def test_a_changed_recipe_runs_what_follows_only(command: Command, tiny_base: Path) -> None:
    done = command("plan", "tiny", "--set", "sft.steps=5", "--json", "--base-dir", str(tiny_base))
    changed = to_do(done)
    assert list(changed) == ["sft", "sft_eval", "rl", "rl_eval", "export", "report"]
    assert changed["sft"]["why"] == "sft.steps: 12 -> 5"


@pytest.fixture
def without_prefect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect cannot be imported, neither by the command nor by what it starts."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['prefect'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("without_prefect")
@pytest.mark.parametrize("row", ["tokenizer", "pretrain", "mid", "sft_eval"])
def test_a_lost_artefact_is_made_again_alone_and_the_same_without_prefect(
    command: Command, tiny_copy: Path, row: str
) -> None:
    plan = ("plan", "tiny", "--json", "--base-dir", str(tiny_copy))
    (directory,) = (tiny_copy / row).iterdir()
    before = json.loads((directory / "result.json").read_text())
    shutil.rmtree(directory)
    assert list(to_do(command(*plan))) == [row]
    assert nanochat(tiny_copy, "stage", row, "tiny").returncode == 0
    after = json.loads((directory / "result.json").read_text())
    assert store.content(after) == store.content(before)
    assert to_do(command(*plan)) == {}
