"""Stops a stage before memory runs out, so that it saves and the machine stays alive.

On a DGX Spark the GPU takes its memory from the same pool as everything else. What the driver holds belongs
to no process in the kernel's books, so its own killer picks wrongly or comes too late, and the box freezes
until somebody pulls the plug (NVIDIA's open-gpu-kernel-modules, issue 1358). MemAvailable shows it coming.
"""

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat_core.machine.hardware import Memory, memory, unified

BACK_SECONDS = 300.0  # the driver gives memory back up to a minute after its process has ended
FEW_ROWS = 8  # of a forward pass, where the profile names no device batch: small enough for its models


class MemoryLimits(NamedTuple):
    """Shares of all memory: below `stop` a stage is asked to save and end, below `kill` it is ended."""

    stop: float
    kill: float


# A checkpoint is copied before it is written, for a d20 about 11 GB: 12% of 120 GB leaves room for that, and
# others stop there too (16 GB). Below 4% the box has seconds. With memory of its own on the GPU the kernel's
# killer works, and only has to be preceded.
SHARED, OWN = MemoryLimits(0.12, 0.04), MemoryLimits(0.04, 0.015)


INTEGRATED = "NANOCHAT_UNIFIED_MEMORY"  # set where torch says so of a GPU whose name nobody knows


@functools.cache
def limits() -> MemoryLimits:
    """Those of this machine, found out once. A driver that cannot be understood does not loosen them."""
    return OWN if unified() is False and INTEGRATED not in os.environ else SHARED


Verdict = Literal["", "stop", "kill"]


def look(read: Callable[[], Memory | None] = memory, bounds: MemoryLimits | None = None) -> Verdict:
    """What should happen to the stage at work."""
    found, (stop, kill) = read(), bounds or limits()
    if found is None:
        return ""
    free = found.available / found.total
    return "kill" if free < kill else "stop" if free < stop else ""


def relieve(
    process: "subprocess.Popen[bytes]", seconds: float, see: Callable[[], str] = look, poll: float = 0.1
) -> bool:
    """Have a stage save and end, as long as there is memory for that; whether it did so by itself."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    while process.poll() is None and time.monotonic() < deadline and see() != "kill":
        time.sleep(poll)
    if process.poll() is not None:
        return True
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False


def await_memory(
    seconds: float = BACK_SECONDS, see: Callable[[], str] = look, stopping: Callable[[], bool] = lambda: False
) -> None:
    """Wait until there is room again, but not for ever: what is short then may be somebody else's doing."""
    deadline = time.monotonic() + seconds
    while see() and time.monotonic() < deadline and not stopping():
        time.sleep(1)


def offer_first() -> None:
    """Name this process as the first to go, should the kernel have to choose: it can go on from a checkpoint,
    the Prefect server and an ssh session cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
