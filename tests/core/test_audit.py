"""`nanochat audit` on a real stage: the same bits, and each way in which they may not be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_core.artifacts import store, transcript
from nanochat_core.runner import launch
from nanochat_core.runner import plan as plans

pytestmark = pytest.mark.slow


def tiny(base: Path) -> plans.Plan:
    return plans.load("tiny", ["runtime.audit_stretches=1"], base_dir=base, until="pretrain")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("prepared")
    for row in ("shards_head", "shards", "tokenizer"):
        launch.launch(tiny(base), row)
    return base


@pytest.fixture
def before(prepared: Path, tmp_path: Path) -> Path:
    """A base directory in which all that pretraining reads is there."""
    return shutil.copytree(prepared, tmp_path / "base")


def audited(base: Path) -> "subprocess.CompletedProcess[str]":
    words = ["audit", "pretrain", "tiny", "--base-dir", str(base)]
    return subprocess.run(
        [sys.executable, "-m", "nanochat_core.cli.main", *words], capture_output=True, text=True
    )


def test_a_finished_stage_is_replayed_to_the_same_bits_and_left_as_it_was(before: Path) -> None:
    plan = tiny(before)
    launch.launch(plan, "pretrain")
    plans.remember(plan)
    path = plan.jobs["pretrain"].path
    files = {file: store.entry(file) for file in path.rglob("*") if file.is_file()}
    assert sorted(folder.name for folder in (path / "audits").iterdir()) == ["step_00000000", "step_00000004"]
    done = audited(before)
    assert (done.returncode, done.stdout) == (0, "pretrain steps 0 to 4: same bits\n"), done.stderr
    assert {file: store.entry(file) for file in path.rglob("*") if file.is_file()} == files
    assert [folder.name for folder in path.parent.iterdir()] == [path.name]
    lines = transcript.read(path)
    assert lines[-1]["weights"] == store.sha256(path / "model.safetensors")

    model = path / "audits" / "step_00000000" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-100] ^= 1
    model.write_bytes(data)
    done = audited(before)
    assert done.returncode == 1 and "model.safetensors has changed" in done.stderr

    (path / transcript.FILE).write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[2]) + "\n")
    done = audited(before)
    assert done.returncode == 1 and "the chain of transcript.jsonl breaks at line 2" in done.stderr


def test_a_bit_that_flipped_unnoticed_is_found(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(
        "from nanochat_core.optim import optimizer\n"
        "reduce = optimizer.Optimizer.reduce\n"
        "def flipped(self):\n"
        "    if self.step_count == 2:\n"
        "        self.pieces[0].grads.view(__import__('torch').int32)[7] ^= 1 << 20\n"
        "    return reduce(self)\n"
        "optimizer.Optimizer.reduce = flipped\n"
    )
    plan = tiny(before)
    plans.remember(plan)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(planted))
        launch.launch(plan, "pretrain")
    done = audited(before)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "pretrain steps 0 to 4: weights, optimizer differ\n"
