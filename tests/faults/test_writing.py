"""What happens while a checkpoint is being written: killed in the middle, or the disk is full."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import kill, start, tiny, weights_and_losses

from nanochat_core.runner import launch

UNFINISHED = "*.part"


def stop_within_a_write(process: "subprocess.Popen[bytes]", checkpoints: Path, after: int) -> bool:
    """Stop the process while a checkpoint lies there half-written, once `after` are complete."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            found = list(checkpoints.iterdir())
            if any(path.suffix == ".part" for path in found) and len(found) > after:
                os.killpg(process.pid, signal.SIGSTOP)
                time.sleep(0.01)
                if any(checkpoints.glob(UNFINISHED)):
                    return True
                os.killpg(process.pid, signal.SIGCONT)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [("pretrain", 0), ("pretrain", 2), ("rl", 1)],  # the first of all, a later one, another loop's
    indirect=["before"],
)
def test_sigkill_during_a_checkpoint_write(
    before: Path, after: int, tiny_base: Path, request: pytest.FixtureRequest
) -> None:
    stage = request.node.callspec.params["before"]
    path = tiny(before).jobs[stage].path
    process = start(before, stage)
    assert stop_within_a_write(process, path / "checkpoints", after), "no write was caught in the middle"
    kill(process, signal.SIGKILL)
    assert list((path / "checkpoints").glob(UNFINISHED))
    launch.launch(tiny(before), stage)
    assert weights_and_losses(before, stage) == weights_and_losses(tiny_base, stage)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("before", ["pretrain"], indirect=True)
def test_a_full_disk_leaves_the_last_checkpoint_and_a_clear_error(
    before: Path, tiny_base: Path, small_disk: Path
) -> None:
    subprocess.run(["cp", "-r", str(before), str(small_disk)], check=True)
    base = small_disk / before.name
    filler = small_disk / "filler"
    path = tiny(base).jobs["pretrain"].path

    def fill(row: object) -> None:
        if not filler.exists() and len(list((path / "checkpoints").glob("step_????????"))) > 1:
            with contextlib.suppress(OSError), filler.open("wb") as f:
                while True:
                    f.write(b"\0" * 4096)
                    f.flush()

    with pytest.raises(
        launch.StageFailed, match="the disk is full; free some space and run the same command"
    ):
        launch.launch(tiny(base), "pretrain", fill)
    assert list((path / "checkpoints").glob("step_????????"))
    filler.unlink()
    launch.launch(tiny(base), "pretrain")
    assert "going on from the checkpoint" in (path / "log.txt").read_text()
    assert weights_and_losses(base, "pretrain") == weights_and_losses(tiny_base, "pretrain")
