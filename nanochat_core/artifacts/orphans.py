"""Who works on a job, and an end for one whose parent is gone: told to save, then made to stop.

A stage is told by the kernel when its parent dies. One that hangs would keep its lock for ever, and with it
the next attempt waiting; so whoever waits for a lock looks whether its holder is such an orphan.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nanochat_core.artifacts import store

LOOK_SECONDS, SAY_SECONDS = 0.5, 1800.0


class Process(NamedTuple):
    """A process as the kernel knows it; its start in ticks since boot, which no clock changes."""

    pid: int
    parent: int
    start: int


def process(pid: int) -> Process | None:
    """What is known of a living process; None if there is none, or no /proc to ask."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else Process(pid, int(fields[1]), int(fields[19]))


def sign(lock: Path) -> None:
    """Note in a lock that we hold who holds it."""
    lock.write_text(json.dumps(process(os.getpid())))


def orphan(lock: Path) -> Process | None:
    """The process that signed a lock, if it lives and its parent does not."""
    try:
        signed = Process(*json.loads(lock.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    now = process(signed.pid)
    return now if now is not None and now.start == signed.start and now.parent != signed.parent else None


@contextlib.contextmanager
def taken_over(lock: Path, seconds: float) -> Iterator[None]:
    """Hold a job's lock, or the device's, as soon as it is free, also across exec. An orphan that holds it
    gets `seconds` to save and end."""
    told: dict[int, float] = {}  # an orphan's start -> when it was told to stop
    said = time.monotonic()
    while True:
        if time.monotonic() - said > SAY_SECONDS:  # who waits does not hang
            print("still waiting for it", flush=True)
            said = time.monotonic()
        with store.locked(lock, wait=False, keep=True) as ours:
            if ours:
                yield
                return
        found = orphan(lock)
        if found is not None:
            since = told.get(found.start)
            with contextlib.suppress(ProcessLookupError):
                if since is None:
                    told[found.start] = time.monotonic()
                    print(f"its process {found.pid} has lost its parent and is told to stop", flush=True)
                    os.killpg(os.getpgid(found.pid), signal.SIGTERM)
                elif time.monotonic() - since > seconds:
                    print(f"its process {found.pid} does not stop and is ended", flush=True)
                    os.killpg(os.getpgid(found.pid), signal.SIGKILL)
        time.sleep(LOOK_SECONDS)
