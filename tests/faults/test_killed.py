"""A stage killed anywhere and started again ends in the same bytes as one that was left alone."""

import signal
from pathlib import Path

import pytest
from killing import kill, start, tiny, wait_for_step, weights_and_losses

from nanochat_core.artifacts import store
from nanochat_core.runner import launch


@pytest.mark.parametrize(
    ("before", "told", "killed"),
    [
        ("pretrain", 3, 10),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [("mid", 2, 6), ("sft", 2, 7), ("rl", 1, 5)]
        ),
    ],
    indirect=["before"],
)
def test_told_to_stop_and_then_killed_costs_only_the_steps_since_the_checkpoint(
    before: Path, told: int, killed: int, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    stage = request.node.callspec.params["before"]
    path = tiny(before).jobs[stage].path
    for step, signum, code in (
        (told, signal.SIGTERM, launch.INTERRUPTED),
        (killed, signal.SIGKILL, -signal.SIGKILL),
    ):
        process = start(before, stage)
        wait_for_step(process, path, step)
        assert kill(process, signum) == code, (path / "log.txt").read_text()
        assert not (path / "result.json").exists()
    launch.launch(tiny(before), stage)
    log = (path / "log.txt").read_text()
    assert (
        log.count("told to stop; saved a checkpoint") == 1 and log.count("going on from the checkpoint") == 2
    )
    assert weights_and_losses(before, stage) == weights_and_losses(tiny_base, stage)
    assert [event["event"] for event in store.read_attempts(path)] == [
        "started",
        "stopped",
        "started",
        "started",
        "finished",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("before", ["pretrain"], indirect=True)
def test_sigkill_at_every_third_step_of_one_run(before: Path, tiny_base: Path) -> None:
    """Again and again, so that most of them hit a run that is itself recovering from the one before."""
    stage = "pretrain"
    path = tiny(before).jobs[stage].path
    killed = 0
    for step in range(0, 14, 3):
        process = start(before, stage)
        wait_for_step(process, path, step)
        killed += kill(process, signal.SIGKILL) == -signal.SIGKILL
    assert killed > 1, (path / "log.txt").read_text()
    launch.launch(tiny(before), stage)
    assert weights_and_losses(before, stage) == weights_and_losses(tiny_base, stage)
