"""When copies go to the mirror and come back: beside the run, never in its way.

A thread follows the run's directories and sends each finished artefact and each new checkpoint. A mirror that
is away is tried again and spoken of; training neither waits for it nor fails with it.
"""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store
from nanochat_core.artifacts.mirror import Mirror, of, reason
from nanochat_core.artifacts.stage import Job
from nanochat_core.runner.plan import Plan, changed_input, saved_step

Tell = Callable[[str], None]

LOOK_SECONDS = 5.0
AGAIN_SECONDS = (15.0, 300.0)  # after a failure: the first pause, and the longest
REMIND_SECONDS = 3600.0  # between two words about the same trouble
LAST_TRIES = 3  # at a run's end


def bring(plan: Plan, name: str, lock: Path, tell: Tell) -> None:
    """Fetch what the mirror has of a row and this machine has not: its artefact, or a later checkpoint."""
    mirror, job = of(plan.runtime), plan.jobs[name]
    if mirror is None:
        return
    with store.locked(lock, wait=False) as ours:
        if not ours:
            return  # somebody is making it here
        found = mirror.look(job)
        try:
            if found.result is not None and changed_input(found.result, job, plan.sources[name]) is None:
                mirror.fetch(job, found.result)
            elif found.step is not None and found.step > (saved_step(job.path) or -1):
                inputs = {role: content(path) for role, path in job.inputs.items()}
                mirror.fetch_checkpoint(job, found.step, inputs)
        except Exception as error:  # what cannot be had from there is made here
            tell(f"{name} could not be fetched from the mirror: {reason(error)}")


def content(directory: Path) -> str:
    result = store.read_result(directory)
    return store.content(result) if result is not None else ""


class Copies:
    """Sends what a plan's rows leave on the disk. One at a time per base directory."""

    def __init__(self, mirror: Mirror, jobs: Mapping[str, Job[Any]], base_dir: Path, tell: Tell) -> None:
        self.mirror, self.jobs, self.base_dir, self.tell = mirror, jobs, base_dir, tell
        self.sent: dict[str, str] = {}  # row -> what of it the mirror is known to have
        self.told = -REMIND_SECONDS
        self.failing = False

    def lacking(self) -> dict[str, str]:
        """Row -> what of it lies here and is not known to be there: "finished", or the checkpoint's name."""
        found = {}
        for name, job in self.jobs.items():
            result = job.path / "result.json"
            if result.exists():
                mark = f"finished {result.stat().st_mtime_ns}"
            else:
                step = saved_step(job.path)
                mark = f"step_{step:08d}" if step is not None else ""
            if mark and self.sent.get(name) != mark:
                found[name] = mark
        return found

    def round(self) -> list[str]:
        """Send all that is lacking; the rows sent. The first failure ends it, and is raised."""
        done = []
        with store.locked(self.base_dir / "locks" / "mirror.lock") as _:
            for name, mark in self.lacking().items():
                job = self.jobs[name]
                try:
                    if mark.startswith("finished"):
                        new = self.mirror.push(job)
                    else:
                        new = self.mirror.push_checkpoint(job, job.path / "checkpoints" / mark)
                except store.Damaged:
                    continue  # the next plan says so, and makes it again
                except FileNotFoundError:
                    if self.lacking().get(name) == mark:
                        raise
                    continue  # it has been replaced meanwhile; the next round sends the new one
                self.sent[name] = mark
                if new:
                    done.append(name)
        return done

    def follow(self, over: threading.Event) -> None:
        pause = LOOK_SECONDS
        while not over.wait(pause):
            try:
                self.round()
            except Exception as error:  # whatever it is, the training goes on
                first, longest = AGAIN_SECONDS
                pause = min(longest, 2 * pause) if self.failing else first
                self.failing = True
                if time.monotonic() - self.told >= REMIND_SECONDS:
                    self.told = time.monotonic()
                    self.tell(f"the mirror cannot be written: {reason(error)}; it is tried again")
                continue
            if self.failing:
                self.tell(f"the mirror answers again: {self.mirror.url}")
            self.failing, self.told, pause = False, -REMIND_SECONDS, LOOK_SECONDS


class Following:
    """What a run holds: asked at its end to send the rest."""

    def __init__(self, copies: Copies | None, plan: Plan) -> None:
        self.copies, self.plan, self.over = copies, plan, threading.Event()

    def finish(self) -> list[str]:
        """Send what is left; the rows that could not be sent, which are named."""
        self.over.set()
        if self.copies is None:
            return []
        for again in reversed(range(LAST_TRIES)):
            try:
                self.copies.round()
                break
            except Exception as error:
                trouble = reason(error)
                if again:
                    time.sleep(LOOK_SECONDS)
        else:
            left = list(self.copies.lacking())
            self.copies.tell(
                f"the mirror lacks {', '.join(left)} ({trouble}); to send it: "
                f"nanochat mirror {self.plan.profile}"
            )
            return left
        return []


@contextmanager
def following(plan: Plan, tell: Tell) -> Iterator[Following]:
    """Around a run: what its rows leave is copied while it goes on. Without a mirror this is nothing."""
    mirror = of(plan.runtime)
    if mirror is None:
        yield Following(None, plan)
        return
    base_dir = plan.runtime.base_dir
    with store.locked(base_dir / "locks" / "mirror.lock", wait=False) as ours:
        if ours:  # what a killed one has left
            shutil.rmtree(base_dir / "mirror", ignore_errors=True)
    held = Following(Copies(mirror, plan.jobs, base_dir, tell), plan)
    assert held.copies is not None
    thread = threading.Thread(target=held.copies.follow, args=(held.over,), name="mirror", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        held.over.set()
