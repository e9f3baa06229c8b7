"""A stage killed anywhere and started again ends in the same bytes as one that was left alone."""

import signal
from pathlib import Path

import pytest
from killing import kill, start, tiny, wait_for_step, weights_and_losses

from nanochat_core.artifacts import store
from nanochat_core.runner import launch


@pytest.mark.parametrize(
    ("before", "step"), [("pretrain", 6), ("mid", 5), ("sft", 7), ("rl", 5)], indirect=["before"]
)
def test_sigkill_costs_only_the_steps_since_the_checkpoint(
    before: Path, step: int, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    stage = request.node.callspec.params["before"]
    process = start(before, stage)
    path = tiny(before).jobs[stage].path
    wait_for_step(process, path, step)
    assert kill(process, signal.SIGKILL) == -signal.SIGKILL
    assert not (path / "result.json").exists()
    launch.launch(tiny(before), stage)
    assert "going on from the checkpoint" in (path / "log.txt").read_text()
    assert weights_and_losses(before, stage) == weights_and_losses(tiny_base, stage)
    assert [event["event"] for event in store.read_attempts(path)] == ["started", "started", "finished"]


@pytest.mark.parametrize("before", ["pretrain"], indirect=True)
def test_sigterm_ends_in_a_checkpoint_and_says_so(before: Path, tiny_base: Path) -> None:
    process = start(before, "pretrain")
    path = tiny(before).jobs["pretrain"].path
    wait_for_step(process, path, 5)
    assert kill(process, signal.SIGTERM) == launch.INTERRUPTED
    assert "told to stop; saved a checkpoint" in (path / "log.txt").read_text()
    launch.launch(tiny(before), "pretrain")
    assert weights_and_losses(before, "pretrain") == weights_and_losses(tiny_base, "pretrain")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "steps"), [("pretrain", 16), ("mid", 10), ("sft", 12), ("rl", 8)], indirect=["before"]
)
def test_sigkill_at_every_third_step_of_one_run(
    before: Path, steps: int, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    """Again and again, so that most of them hit a run that is itself recovering from the one before."""
    stage = request.node.callspec.params["before"]
    path = tiny(before).jobs[stage].path
    killed = 0
    for step in range(0, steps - 2, 3):
        process = start(before, stage)
        wait_for_step(process, path, step)
        killed += kill(process, signal.SIGKILL) == -signal.SIGKILL
    assert killed > 1, (path / "log.txt").read_text()
    launch.launch(tiny(before), stage)
    assert weights_and_losses(before, stage) == weights_and_losses(tiny_base, stage)
