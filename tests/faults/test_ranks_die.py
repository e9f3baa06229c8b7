"""A stage on two processes: killed and resumed in the same bytes, and a rank that dies is named."""

import contextlib
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from killing import kill, start, tiny, wait_for_step, weights_and_losses

from nanochat_core.artifacts import store
from nanochat_core.runner import launch

pytestmark = pytest.mark.slow
TWO = "runtime.nproc=2"


def rank_process(job: Path, rank: int) -> int:
    """The process id of one rank of the job in a directory."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                environment = (folder / "environ").read_bytes().split(b"\0")
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in environment and str(job / "job.json").encode() in words:
                    return int(folder.name)
    raise AssertionError(f"rank {rank} of {job} is not there")


@pytest.mark.parametrize(("before", "step"), [("pretrain", 6), ("sft", 7), ("rl", 5)], indirect=["before"])
def test_two_ranks_resume_exactly(before: Path, step: int, request: pytest.FixtureRequest) -> None:
    stage = request.node.callspec.params["before"]
    launch.launch(tiny(before, TWO), stage)
    undisturbed = weights_and_losses(before, stage)
    path = tiny(before).jobs[stage].path
    shutil.rmtree(path)

    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start(before, stage, TWO)
        wait_for_step(process, path, step if number == signal.SIGTERM else step + 2)
        assert process.poll() is None, (path / "log.txt").read_text()
        kill(process, number)
        assert not (path / "result.json").exists()
        if number == signal.SIGTERM:
            assert "told to stop; saved a checkpoint" in (path / "log.txt").read_text()
    launch.launch(tiny(before, TWO), stage)
    assert "going on from the checkpoint" in (path / "log.txt").read_text()
    assert weights_and_losses(before, stage) == undisturbed


@pytest.mark.parametrize("before", ["pretrain"], indirect=True)
def test_a_rank_that_is_killed_ends_the_job_and_is_named(before: Path) -> None:
    plan = tiny(before, TWO)
    path = plan.jobs["pretrain"].path
    seen: list[int] = []

    def kill_the_second(row: object) -> None:
        if not seen:
            seen.append(rank_process(path, 1))
            os.kill(seen[0], signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(launch.StageKilled, match="rank 1 was ended by SIGKILL"):
        launch.launch(plan, "pretrain", kill_the_second)
    assert seen and time.monotonic() - began < 90, "the others wait for a rank that is gone"
    launch.launch(plan, "pretrain")
    assert store.verify(path, before) is not None


@pytest.mark.parametrize("before", ["pretrain"], indirect=True)
def test_a_rank_that_fails_shows_its_own_error(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the launcher's, nor that of the rank which lost its neighbour."""
    planted = tmp_path / "planted"
    planted.mkdir()
    (planted / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from nanochat_core.optim import optimizer\n"
        "    def update(self, **rates):\n"
        "        raise RuntimeError('a planted fault in the second rank')\n"
        "    optimizer.Optimizer.update = update\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(planted))
    with pytest.raises(launch.StageFailed, match="a planted fault in the second rank"):
        launch.launch(tiny(before, TWO), "pretrain")


@pytest.mark.parametrize("before", ["pretrain"], indirect=True)
def test_of_two_jobs_at_once_the_second_finds_the_result_and_none_of_its_ranks_waits(before: Path) -> None:
    plan = tiny(before, TWO)
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(launch.launch, plan, "pretrain") for _ in range(2)]
        first, second = (one.result(timeout=240) for one in found)
    assert first == second
    attempts = store.read_attempts(plan.jobs["pretrain"].path)
    assert [event["event"] for event in attempts] == ["started", "finished"]
