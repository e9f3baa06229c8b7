"""A stage whose parent is gone ends, or is made to, before the next attempt begins; others are left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toys import Toy

from nanochat_core.artifacts import orphans, store

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")

HOLDER = """
import signal, sys, time
from pathlib import Path
from nanochat_core.artifacts import orphans, store
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2] == "deaf" else signal.SIG_DFL)
with store.locked(Path(sys.argv[1])):
    orphans.sign(Path(sys.argv[1]))
    Path(sys.argv[1] + ".ready").touch()
    time.sleep(60)
"""
PARENT = (
    "import subprocess, sys, time\n"
    "subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True)\n"
    "time.sleep(60)\n"
)


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a.lock"
    yield path
    signed = orphans.process(json.loads(path.read_text())[0])
    if signed is not None and signed.pid != os.getpid():
        os.kill(signed.pid, signal.SIGKILL)


def held(lock: Path, how: str) -> "subprocess.Popen[bytes]":
    """The parent of a process that holds a lock."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT, "-c", HOLDER, str(lock), how])
    ready = Path(f"{lock}.ready")
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return parent


@pytest.mark.parametrize("how", ["listens", "deaf"])
def test_an_orphan_is_stopped_and_its_lock_taken_over(
    lock: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orphans, "LOOK_SECONDS", 0.02)
    parent = held(lock, how)
    assert orphans.orphan(lock) is None  # its parent lives
    parent.kill()
    parent.wait()
    while orphans.orphan(lock) is None:
        time.sleep(0.01)
    with orphans.taken_over(lock, 0.2), store.locked(lock, wait=False) as another:
        assert not another  # it is ours now
    assert orphans.orphan(lock) is None


def test_a_process_that_took_the_number_of_an_old_holder_is_left_alone(lock: Path) -> None:
    mine = orphans.process(os.getpid())
    assert mine is not None
    lock.write_text(json.dumps([mine.pid, mine.parent + 1, mine.start - 1]))
    assert orphans.orphan(lock) is None
    lock.write_text(json.dumps([mine.pid, mine.parent + 1, mine.start]))
    assert orphans.orphan(lock) == mine
    lock.write_text("")
    assert orphans.orphan(lock) is None
    orphans.sign(lock)


def test_an_orphan_does_not_keep_the_device(toy: Toy) -> None:
    """Its parent was killed while it hung, so nobody else ends it."""
    made = toy.plan(until="pretrain")
    device = toy.base_dir / "locks" / "device.lock"
    device.parent.mkdir(parents=True)
    parent = held(device, "listens")
    parent.kill()
    parent.wait()
    toy.run(made)
    said = (made.jobs["pretrain"].path / "log.txt").read_text()
    assert "another stage is at work on this device" in said and "has lost its parent" in said
