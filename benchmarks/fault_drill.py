"""Faults at random moments of `tiny` runs on a real server, worker and reconciler, until N were made.

    uv run python benchmarks/fault_drill.py --faults 100 --seed 1 [--postgres] [--json]

Each run is started through the API and suffers --per-run faults; kind, stage and delay are drawn from the
seed. After each run: it has ended by itself, weights and report are those of an undisturbed run, nothing that
had finished ran twice, no process and no slot is left. A run that is not so is lost: it is listed with the
reason, and the exit code is 1. What only a person can do is done as the runbook says: `nanochat up` after
a power cut (systemd's part), Retry after a cancel, free space and Retry after a full disk.
"""

import argparse
import contextlib
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults import FAULTS, INTERRUPTING, Drill, Made, NoEffect, set_clock
from machine import Machine, Postgres, until

from nanochat_core.artifacts import store
from nanochat_core.runner import plan as plans
from nanochat_core.runner.launch import result_of

TRAINED = ("pretrain", "mid", "sft", "rl")
DAMAGES = ("artefact deleted", "artefact truncated", "one bit flipped")
CLOCK_EVERY = 6  # runs: for one in so many the machine is started with a clock that can be set
DISK_BYTES = 2**30
DELAY_SECONDS = 4.0  # the longest wait between a stage's beginning and its fault
RUN_SECONDS = 1500.0  # a run that takes longer is lost


def outcome(plan: plans.Plan) -> dict[str, Any]:
    """What must not depend on what happened on the way: all weights, and every number of the report but those
    about the way itself (`run/`: seconds, restarts, energy)."""
    weights = {
        stage: hashlib.sha256((plan.jobs[stage].path / "model.safetensors").read_bytes()).hexdigest()
        for stage in TRAINED
        if stage in plan.jobs
    }
    report = result_of(plan.jobs["report"].path) if "report" in plan.jobs else {}
    return {
        "weights": weights,
        "report": {key: value for key, value in report.items() if not key.startswith("run/")},
    }


def ran_twice(base: Path, allowed: set[str]) -> list[str]:
    """Stages that were started after they had finished, and not because their artefact was damaged."""
    found = []
    for path in sorted(base.glob("*/*/attempts.jsonl")):
        events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
        stage = path.parent.parent.name
        if "started" in events[events.index("finished") :] and stage not in allowed:
            found.append(stage)
    return found


def wrong(drill: Drill) -> str | None:
    """Why a run is lost, or None: everything that must be so after a run."""
    machine = drill.machine
    if until(drill.over, RUN_SECONDS, every=1) is None:
        return f"it did not end within {RUN_SECONDS:.0f} s: {machine.state(drill.run)}"
    state = machine.state(drill.run)
    if state["type"] != "COMPLETED":
        return f"it ended {state['name']}: {state['message']}"
    for other in drill.others:
        if until(lambda run=other: machine.state(run)["type"] == "COMPLETED", 300, every=1) is None:
            return f"the run started at the same time is {machine.state(other)}"
    for process in drill.by_hand:
        said, _ = process.communicate(timeout=600)
        if process.returncode != 0:  # cut off, or out of space: it says to run the same command again
            try:
                machine.nanochat("run", "tiny", "--until", list(drill.plan.jobs)[-1])
            except RuntimeError as error:
                return f"the run by hand ended with {process.returncode}: {said[-300:]}, and again: {error}"
    if until(lambda: not machine.strangers(), 30) is None:
        return f"left over: {machine.strangers()}"
    if until(lambda: machine.unfinished() == 0, 60, every=1) is None:
        return f"{machine.unfinished()} slots are still taken"
    if (doubled := ran_twice(machine.base, drill.damaged)) != []:
        return f"ran twice: {doubled}"
    for name, job in drill.plan.jobs.items():
        try:
            store.verify(job.path, machine.base, hashes=True)
        except store.Damaged as damage:
            return f"{name} is left damaged: {damage}"
    try:
        found = outcome(drill.plan)
    except (OSError, ValueError) as error:
        return f"its outcome is incomplete: {error}"
    if found != drill.reference:
        before, after = drill.reference["weights"], found["weights"]
        others = [stage for stage in before if before[stage] != after[stage]]
        return f"it came out different: {others or 'the report'}"
    return None


def strike(fault: Made, drill: Drill, rng: random.Random, deadline: float) -> bool:
    """Make a fault as soon as there is something to break; False if the run was over before."""
    while time.monotonic() < deadline and not drill.over():
        fault.stage, fault.begin = drill.machine.stage() or "between stages", time.monotonic()
        try:
            fault.detail = FAULTS[fault.kind](drill, rng)
            return True
        except NoEffect:
            time.sleep(0.2)
    return False


def one_run(drill: Drill, number: int, kinds: list[str], rng: random.Random) -> tuple[list[Made], str | None]:
    """A run with its faults, each at its drawn moment."""
    machine = drill.machine
    for path in machine.base.iterdir():
        if path.name not in ("prefect", "locks"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    set_clock(drill.clock, 0)
    drill.others, drill.by_hand, drill.damaged = [], [], set()
    rows = list(drill.plan.jobs)
    moments = sorted(
        ((rng.randrange(2 if kind in DAMAGES else 0, len(rows)), rng.uniform(0, DELAY_SECONDS)), kind)
        for kind in kinds
    )
    drill.run = machine.start(until=rows[-1])
    made: list[Made] = []
    begun, deadline = "", time.monotonic() + RUN_SECONDS
    for (row, delay), kind in moments:
        while time.monotonic() < deadline:
            begun = machine.stage() or ""
            if begun and rows.index(begun) >= row:
                break
            if drill.over():
                break
            time.sleep(0.1)
        time.sleep(delay)
        if drill.over():
            break  # too late: this fault is not counted, and drawn again
        fault = Made(kind, number, machine.stage() or "between stages")
        try:
            if not strike(fault, drill, rng, deadline):
                break
        except RuntimeError as error:
            return [*made, fault], str(error)
        if kind in INTERRUPTING:
            fault.resume = drill.resumed(fault.begin)
        made.append(fault)
        resumed = "not seen to resume" if fault.resume is None else f"resumed after {fault.resume:.1f} s"
        said = f" {resumed}" if kind in INTERRUPTING else ""
        print(f"  run {number}  {fault.stage:<15}{kind:<24}{fault.detail}{said}", flush=True)
    return made, wrong(drill)


@contextlib.contextmanager
def computer(args: argparse.Namespace) -> Iterator[Drill]:
    root = Path(tempfile.mkdtemp(prefix="nanochat-drill-"))
    root.chmod(0o755)  # the user postgres has to reach its folder
    clock = root / "clock"
    set_clock(clock, 0)
    postgres = Postgres(root) if args.postgres else None
    machine = Machine(root)
    if postgres:
        machine.env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = postgres.url
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(machine.base)], capture_output=True
    )
    mounted = mount.returncode == 0
    if not mounted:
        FAULTS.pop("disk full, then Retry")
        print("left out: disk full (a small disk cannot be mounted here)", flush=True)
    try:
        plan = plans.load("tiny", base_dir=args.reference or machine.base, until=args.until)
        if args.reference is None:
            begin = time.monotonic()
            machine.nanochat("run", "tiny", "--until", args.until)
            print(f"the undisturbed run took {time.monotonic() - begin:.0f} s", flush=True)
        reference = outcome(plan)
        plan = plans.load("tiny", base_dir=machine.base, until=args.until)
        yield Drill(machine, postgres, plan, reference, args.away, clock)
    finally:
        machine.kill(number=18)
        machine.power_cut()
        if postgres:
            postgres.cut()
        if mounted:
            subprocess.run(["umount", "-l", str(machine.base)])
        if args.keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


def settable_clock(library: Path) -> bool:
    """Build the wall clock that can be set."""
    source = str(Path(__file__).with_name("clock.c"))
    compiler = shutil.which("cc")
    command = [compiler or "cc", "-O2", "-shared", "-fPIC", "-o", str(library), source, "-ldl"]
    return compiler is not None and subprocess.run(command).returncode == 0


def decks(rng: random.Random) -> Iterator[str]:
    """Every kind as often as every other, in a drawn order."""
    while True:
        deck = [kind for kind in FAULTS if kind != "clock back an hour"]
        rng.shuffle(deck)
        yield from deck


def drill_until(drill: Drill, args: argparse.Namespace) -> tuple[list[Made], dict[int, str]]:
    shim = settable_clock(drill.clock.with_suffix(".so"))
    if not shim:
        print("left out: the clock set back (there is no C compiler to build benchmarks/clock.c)", flush=True)
    settable = {"LD_PRELOAD": str(drill.clock.with_suffix(".so")), "NANOCHAT_CLOCK": str(drill.clock)}
    made: list[Made] = []
    lost: dict[int, str] = {}
    deck = decks(random.Random(args.seed))
    number, up = 0, False
    end = time.monotonic() + 60 * args.minutes
    while len(made) < args.faults and time.monotonic() < end:
        rng = random.Random(f"{args.seed}-{number}")
        clock = shim and "clock back an hour" in FAULTS and number % CLOCK_EVERY == 1
        kinds = [next(deck) for _ in range(min(args.per_run, args.faults - len(made)))]
        if clock:
            kinds[-1] = "clock back an hour"
        if not up or ("LD_PRELOAD" in drill.machine.env) != clock:
            if up:
                drill.machine.down()
            for key, value in settable.items():
                if clock:
                    drill.machine.env[key] = value
                else:
                    drill.machine.env.pop(key, None)
            drill.machine.up()
            up = True
        begin = time.monotonic()
        faults, why = one_run(drill, number, kinds, rng)
        made += faults
        seconds = time.monotonic() - begin
        print(f"run {number}: {why or 'as undisturbed'} ({len(faults)} faults, {seconds:.0f} s)", flush=True)
        if why:
            lost[number] = why
            if args.stop:
                break
            drill.machine.power_cut()  # what it left must not spoil the next run
            shutil.rmtree(drill.machine.base / "locks", ignore_errors=True)
            drill.machine.up()
            if drill.machine.state(drill.run)["type"] not in ("COMPLETED", "FAILED"):
                drill.machine.set_state(drill.run, "FAILED", "Failed")
        number += 1
    return made, lost


def by_stage(made: list[Made], stages: list[str]) -> None:
    """A table of which fault struck which stage, a column for each kind."""
    kinds = [kind for kind in FAULTS if any(fault.kind == kind for fault in made)]
    print("\n" + "\n".join(f"{chr(65 + i)}  {kind}" for i, kind in enumerate(kinds)))
    print(f"\n{'struck at':<16}" + "".join(f"{chr(65 + i):>4}" for i in range(len(kinds))))
    counts = Counter((fault.stage, fault.kind) for fault in made)
    for stage in stages:
        print(f"{stage:<16}" + "".join(f"{counts[stage, kind] or '.':>4}" for kind in kinds))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-run", type=int, default=6, help="faults that one run suffers")
    parser.add_argument("--away", type=float, default=20.0, help="seconds that the server is away or hangs")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no further run after that")
    parser.add_argument("--until", metavar="STAGE", default="report", help="how far each run goes")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="a base directory where tiny has run")
    parser.add_argument("--only", metavar="KIND", nargs="+", help="only faults whose name contains this")
    parser.add_argument("--postgres", action="store_true", help="a PostgreSQL instead of SQLite")
    parser.add_argument("--stop", action="store_true", help="end at the first lost run")
    parser.add_argument("--keep", action="store_true", help="leave the directory to be looked at")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.only:
        for kind in [kind for kind in FAULTS if not any(word in kind for word in args.only)]:
            FAULTS.pop(kind)
    begin = time.monotonic()
    with computer(args) as drill:
        made, lost = drill_until(drill, args)
    head = ("fault", "made", "lost", "seen to resume", "after (median)", "(longest)")
    print(f"\n{head[0]:<26}{head[1]:>5}{head[2]:>6}{head[3]:>16}{head[4]:>16}{head[5]:>12}")
    table = {}
    for kind in FAULTS:
        faults = [fault for fault in made if fault.kind == kind]
        if not faults:
            continue
        resumed = [fault.resume for fault in faults if fault.resume is not None]
        in_lost = sum(fault.run in lost for fault in faults)
        middle, longest = (statistics.median(resumed), max(resumed)) if resumed else (None, None)
        shown = [f"{seconds:.1f} s" if seconds is not None else "-" for seconds in (middle, longest)]
        seen = f"{len(resumed)} of {len(faults)}" if kind in INTERRUPTING else "-"
        print(f"{kind:<26}{len(faults):>5}{in_lost:>6}{seen:>16}{shown[0]:>16}{shown[1]:>12}")
        table[kind] = {
            "made": len(faults),
            "lost": in_lost,
            "unseen": len(faults) - len(resumed) if kind in INTERRUPTING else None,
            "median_s": middle,
            "longest_s": longest,
            "at": Counter(fault.stage for fault in faults),
        }
    by_stage(made, [*drill.plan.jobs, "between stages"])
    runs = {fault.run for fault in made}
    print(f"{len(made)} faults in {len(runs)} runs, {len(lost)} lost, {time.monotonic() - begin:.0f} s")
    for number, why in lost.items():
        print(f"lost: run {number}: {why}")
    if args.json:
        database = "postgresql" if args.postgres else "sqlite"
        print(
            json.dumps(
                {
                    "faults": len(made),
                    "runs": len(runs),
                    "lost": {str(number): why for number, why in lost.items()},
                    "seed": args.seed,
                    "database": database,
                    "by_kind": table,
                }
            )
        )
    sys.exit(1 if lost or not made else 0)


if __name__ == "__main__":
    main()
