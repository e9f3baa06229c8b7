"""The faults that the drill makes: what each does to a machine, and what a person does about it."""

import contextlib
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import Machine, Postgres, until

from nanochat_core.artifacts import store
from nanochat_core.runner import plan as plans

RESUME_SECONDS = 300.0


@dataclass
class Made:
    """One fault as it was made."""

    kind: str
    run: int
    stage: str  # at work at that moment
    begin: float = 0.0
    resume: float | None = None  # seconds until anything was recorded again
    detail: str = ""


class NoEffect(Exception):
    """There was nothing to break at that moment: the fault is not counted, and drawn again."""


@dataclass
class Drill:
    machine: Machine
    postgres: Postgres | None
    plan: plans.Plan
    reference: dict[str, Any]
    away: float
    clock: Path  # the seconds by which the machine's clock is off
    run: str = ""
    others: list[str] = field(default_factory=list)  # flow runs started at the same time
    by_hand: "list[subprocess.Popen[str]]" = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)  # stages, which may run again

    # The faults. Each returns a word about what was done.

    def hit(self, role: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to what plays a role; how many there were."""
        count = self.machine.kill(role, number=number)
        if not count:
            raise NoEffect(f"there was no {role}")
        return count

    def kill_trainer(self, rng: random.Random) -> str:
        return f"{self.hit('stage')} killed"

    def kill_flow(self, rng: random.Random) -> str:
        return f"{self.hit('flow')} killed"

    def kill_worker(self, rng: random.Random) -> str:
        return f"{self.hit('worker')} killed"

    def stop_worker(self, rng: random.Random) -> str:
        return f"{self.hit('worker', number=signal.SIGTERM)} told to stop"

    def kill_server(self, rng: random.Random) -> str:
        return f"{self.hit('server')} killed"

    def kill_reconciler(self, rng: random.Random) -> str:
        return f"{self.hit('recovery')} killed"

    def kill_supervisor(self, rng: random.Random) -> str:
        """With it gone nothing is restarted; what it left must be found by the next one."""
        self.hit("supervisor")
        killed = self.machine.kill(rng.choice(("server", "worker", "recovery")))
        self.machine.up()
        return f"and {killed} of its services"

    def cut_power(self, rng: random.Random) -> str:
        killed = self.machine.power_cut()
        if self.postgres:
            self.postgres.cut()
            self.postgres.start()
        self.machine.up()
        return f"{killed} processes"

    def server_away(self, rng: random.Random) -> str:
        """Connections are refused for a while: the supervisor sleeps, so nobody starts it again."""
        self.hit("supervisor", number=signal.SIGSTOP)
        try:
            self.hit("server")
            time.sleep(self.away)
        finally:
            self.machine.kill("supervisor", number=signal.SIGCONT)
        return f"for {self.away:.0f} s"

    def server_hangs(self, rng: random.Random) -> str:
        self.hit("server", number=signal.SIGSTOP)
        time.sleep(self.away)
        self.machine.kill("server", number=signal.SIGCONT)
        return f"for {self.away:.0f} s"

    def cancel(self, rng: random.Random) -> str:
        self.machine.set_state(self.run, "CANCELLING", "Cancelling")
        took = until(lambda: self.machine.state(self.run)["type"] == "CANCELLED", 120)
        if took is None:
            raise RuntimeError("a cancelled run did not end")
        self.retry()
        return f"ended after {took:.0f} s"

    def fill_disk(self, rng: random.Random) -> str:
        filler = self.machine.base / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as f:  # it may be full already
            while True:
                f.write(bytes(2**16))
                f.flush()
        final = ("FAILED", "COMPLETED", "CRASHED")
        took = until(lambda: self.machine.state(self.run)["type"] in final, 120, every=1)
        state = self.machine.state(self.run)
        filler.unlink(missing_ok=True)
        if took is None or state["type"] == "COMPLETED":
            raise NoEffect("nobody wanted to write meanwhile")
        if state["type"] == "FAILED":
            self.retry()
        return f"{state['name']} after {took:.0f} s: {state['message']}"[:100]

    def damage(self, rng: random.Random, kind: str) -> str:
        finished = sorted(path.parent for path in self.machine.base.glob("*/*/result.json"))
        if not finished:
            raise NoEffect("nothing was finished yet")
        directory = rng.choice(finished)
        try:
            result = store.read_result(directory) or {"files": {}}
        except store.Damaged as damage:
            raise NoEffect("it was damaged already") from damage
        files = [directory / name for name in [*result["files"], "result.json"]]
        files += [self.machine.base / name for name in result.get("shared", {})]
        victim = rng.choice([path for path in files if path.is_file() and path.stat().st_size])
        shared = victim.relative_to(self.machine.base)
        self.damaged |= {directory.parent.name}
        if shared.parts[0] == "downloads":
            self.damaged |= {"shards", "shards_head", "assets"}
        if kind == "artefact deleted":
            if rng.random() < 0.3:
                shutil.rmtree(directory)
                return f"{directory.parent.name}, all of it"
            victim.unlink()
        elif kind == "artefact truncated":
            os.truncate(victim, victim.stat().st_size // 2)
        else:
            stat = victim.stat()
            data = bytearray(victim.read_bytes())
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
            with victim.open("r+b") as f:
                f.write(data)
            os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a disk that rots tells nobody when
        return str(shared)

    def second_run(self, rng: random.Random) -> str:
        last = list(self.plan.jobs)[-1]
        if rng.random() < 0.5:
            self.others.append(self.machine.start(until=last))
            return "through the API"
        self.by_hand.append(self.machine.command("run", "tiny", "--until", last))
        return "by hand"

    def set_clock_back(self, rng: random.Random) -> str:
        set_clock(self.clock, -3600)
        return "by an hour"

    # What is done about a run.

    def retry(self) -> None:
        self.machine.set_state(self.run, "SCHEDULED", "AwaitingRetry")

    def pulse(self) -> dict[Path, int]:
        """What the stages have recorded: it grows as long as work is done."""
        files = [*self.machine.base.glob("*/*/metrics.jsonl"), *self.machine.base.glob("*/*/result.json")]
        sizes = {}
        for path in files:
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        return sizes

    def over(self) -> bool:
        return self.machine.state(self.run)["type"] in ("COMPLETED", "FAILED", "CANCELLED")

    def resumed(self, begin: float) -> float | None:
        """Seconds from `begin` until there is more of anything than there was."""
        seen = self.pulse()
        while time.monotonic() - begin < RESUME_SECONDS:
            now = self.pulse()
            if any(size > seen.get(path, 0) for path, size in now.items()):
                return time.monotonic() - begin
            seen = now
            time.sleep(0.1)
            if int(time.monotonic()) % 5 == 0 and self.over():
                return None
        return None


FAULTS: dict[str, Callable[[Drill, random.Random], str]] = {
    "SIGKILL trainer": Drill.kill_trainer,
    "SIGKILL flow process": Drill.kill_flow,
    "SIGKILL worker": Drill.kill_worker,
    "SIGKILL server": Drill.kill_server,
    "SIGKILL reconciler": Drill.kill_reconciler,
    "SIGKILL supervisor + 1": Drill.kill_supervisor,
    "power cut": Drill.cut_power,
    "SIGTERM worker": Drill.stop_worker,
    "server away": Drill.server_away,
    "server hangs": Drill.server_hangs,
    "cancel, then Retry": Drill.cancel,
    "disk full, then Retry": Drill.fill_disk,
    "artefact deleted": lambda drill, rng: drill.damage(rng, "artefact deleted"),
    "artefact truncated": lambda drill, rng: drill.damage(rng, "artefact truncated"),
    "one bit flipped": lambda drill, rng: drill.damage(rng, "one bit flipped"),
    "second run at once": Drill.second_run,
    "clock back an hour": Drill.set_clock_back,
}
INTERRUPTING = {
    "SIGKILL trainer",
    "SIGKILL flow process",
    "SIGKILL supervisor + 1",
    "power cut",
    "SIGTERM worker",
    "cancel, then Retry",
    "disk full, then Retry",
}


def set_clock(path: Path, seconds: int) -> None:
    with path.open("r+b" if path.exists() else "wb") as f:  # in place: it is mapped by every process
        f.write(struct.pack("=q", seconds))
