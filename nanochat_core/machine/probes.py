"""Where the doctor's facts come from: disk, net, clock and a trial of torch. Tests put their own in place."""

import contextlib
import email.utils
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.machine import trial
from nanochat_core.machine.hardware import HERE, Machine
from nanochat_core.machine.proxy import opener

PROBE_BYTES = 64 << 20
SLEEP = ("sleep.target", "suspend.target", "hibernate.target", "hybrid-sleep.target")


class Reached(NamedTuple):
    """An answer from the net: what went wrong, or its clock."""

    error: str
    clock: float | None


def reach(url: str) -> Reached:
    """Ask a host for nothing but its answer; one that refuses is there."""
    try:
        with opener(url).open(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as refused:
        date = refused.headers.get("Date")
    except (OSError, ValueError) as error:
        return Reached(str(getattr(error, "reason", error)), None)
    with contextlib.suppress(TypeError, ValueError):
        return Reached("", email.utils.parsedate_to_datetime(date).timestamp())
    return Reached("", None)


def free_bytes(path: Path) -> int:
    """Room for files of ours on the disk that a path is, or will be, on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def probe(path: Path) -> tuple[float, float]:
    """Bytes a second of a file written through to the disk, and the seconds a small one takes."""
    while not path.exists():
        path = path.parent
    file, block = path / f"doctor.{os.getpid()}.part", os.urandom(4 << 20)
    try:
        with file.open("wb") as f:
            begin = time.monotonic()
            for _ in range(PROBE_BYTES // len(block)):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            took = time.monotonic() - begin
            f.write(block[:4096])
            f.flush()
            begin = time.monotonic()
            os.fsync(f.fileno())
        return PROBE_BYTES / took, time.monotonic() - begin
    finally:
        file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Edges:
    """Where facts come from; tests put their own here."""

    machine: Machine = HERE
    free: Callable[[Path], int] = free_bytes
    probe: Callable[[Path], tuple[float, float]] = probe
    reach: Callable[[str], Reached] = reach
    trial: Callable[..., dict[str, Any]] = trial.try_out
    which: Callable[[str], str | None] = shutil.which
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
