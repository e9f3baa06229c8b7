"""The processes of deployments' runs in a base directory: found by evidence, told to end, waited for.

A worker ends the flows it has started itself. Those of a worker that was killed live on, and so does a stage
that saves after its flow is gone: whoever ends the services has to find them.
"""

import contextlib
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from nanochat_core.runner.launch import STOP_SECONDS
from nanochat_core.runner.status import at_work


def engines(base_dir: Path) -> list[psutil.Process]:
    """The flows' processes: by the record and lock of each, or, for one that is only starting, by the
    environment that our supervisor gave its worker. A run by hand is not among them."""
    recorded = set()
    for path in (base_dir / "prefect" / "flows").glob("*.json"):
        if at_work(path.with_suffix(".lock")):
            with contextlib.suppress(OSError, ValueError, KeyError):
                recorded.add((int(json.loads(path.read_text())["pid"]), path.stem))
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            run = environment.get("PREFECT__FLOW_RUN_ID")
            if run is None or process.status() == psutil.STATUS_ZOMBIE:
                continue
            starting = environment.get("NANOCHAT_BASE_DIR") == str(base_dir) and flow_words(process)
            if starting or (process.pid, run) in recorded:
                found.append(process)
    return found


def flow_words(process: psutil.Process) -> bool:
    words = process.cmdline()
    return "prefect.engine" in words or "flow-run" in words


def stages(base_dir: Path, flows: Sequence[psutil.Process]) -> list[psutil.Process]:
    """The stages at work for these flows, and those whose flow is gone; not those of a run by hand."""
    parents = {process.pid for process in flows}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            job = job_of(process)
            if job is None or base_dir not in job.parents or process.status() == psutil.STATUS_ZOMBIE:
                continue
            parent, signed = process.ppid(), int(process.environ().get("NANOCHAT_PARENT", 0))
            # torchrun signs with its own number, so that of one whose flow is gone init has to tell
            gone = parent != signed and (signed != process.pid or parent == 1)
            if parent in parents or gone:
                found.append(process)
    return found


def job_of(process: psutil.Process) -> Path | None:
    """The directory of the job that a stage's process works on."""
    words = process.cmdline()
    if "nanochat_core.runner.launch" not in words or not words[-1].endswith("/job.json"):
        return None
    return Path(words[-1]).parent


def jobs(found: Sequence[psutil.Process]) -> list[Path]:
    directories = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            directories.append(job_of(process))
    return [path for path in directories if path is not None]


def end(flows: Sequence[psutil.Process], at_work: Sequence[psutil.Process]) -> None:
    """Tell flows to end, wait until they and the stages have saved, and make them after STOP_SECONDS."""
    for process in flows:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    left = await_end([*flows, *at_work], STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    await_end(left, 10)


def await_end(processes: Sequence[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes, children of ours or not; those that still live."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in processes if lives(process)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
