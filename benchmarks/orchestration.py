"""What the orchestration costs, on a real server, worker and reconciler, beside the same stages without them.

    uv run python benchmarks/orchestration.py [--rounds 2] [--postgres] [--json]

`overhead`: a deployment's run of `tiny` against `nanochat stage report tiny`, which runs the same stages in
the same processes without Prefect; interleaved, medians. `cached`: the same run when nothing is to be done.
`killed`: from SIGKILL to the run's being back on the queue, and to the first new training step; the power cut
counts from the cut itself and includes `nanochat up`. `database`: a part of ten days' log lines, progress,
curves and heartbeats sent at once, and its growth projected to the whole.
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import Machine, Postgres, until

TEN_DAYS = 10 * 86400.0
LONG = "pretrain.steps=4000"  # long enough to be killed in


def fresh(machine: Machine) -> None:
    """As if nothing had been run: only the services keep their folder."""
    for path in machine.base.iterdir():
        if path.name not in ("prefect", "locks"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def finished(machine: Machine, run: str) -> float:
    """Seconds until a run is completed."""
    took = until(lambda: machine.state(run)["type"] in ("COMPLETED", "FAILED"), 1800, every=0.25)
    state = machine.state(run)
    if took is None or state["type"] != "COMPLETED":
        raise RuntimeError(f"the run is {state['name']}: {state['message']}")
    return took


def overhead(machine: Machine, rounds: int) -> dict[str, float]:
    """Seconds of plain stages, of the flow from its being asked for to its end, and of a run all cached."""
    plain, flow, cached, at_hand = [], [], [], []
    for _ in range(rounds):
        fresh(machine)
        begin = time.monotonic()
        machine.nanochat("stage", "report", "tiny")
        plain.append(time.monotonic() - begin)
        fresh(machine)
        begin = time.monotonic()
        finished(machine, machine.start())
        flow.append(time.monotonic() - begin)
        begin = time.monotonic()
        finished(machine, machine.start())
        cached.append(time.monotonic() - begin)
        begin = time.monotonic()
        machine.nanochat("run", "tiny")
        at_hand.append(time.monotonic() - begin)
    median = statistics.median
    return {
        "plain_s": median(plain),
        "flow_s": median(flow),
        "overhead_s": median(b - a for a, b in zip(plain, flow, strict=True)),
        "overhead_ratio": median(b / a for a, b in zip(plain, flow, strict=True)),
        "cached_deployment_s": median(cached),
        "cached_command_s": median(at_hand),
    }


def step(machine: Machine) -> int:
    """How far pretraining is."""
    last = 0
    for path in machine.base.glob("pretrain/*/metrics.jsonl"):
        lines = path.read_text().splitlines()
        last = max(last, *(json.loads(line).get("step", 0) for line in lines[-3:-1]), 0)
    return last


def killed(machine: Machine, what: Callable[[], Any]) -> dict[str, float]:
    """From a fault in the midst of pretraining: seconds until the run is queued again, until a new step."""
    fresh(machine)
    run = machine.start(overrides=[LONG], until="pretrain")
    if until(lambda: step(machine) >= 20, 300) is None:
        raise RuntimeError(f"pretraining did not begin: {machine.state(run)}")
    count = machine.ask(f"flow_runs/{run}")["run_count"]
    begin = time.monotonic()
    what()
    at, detected = step(machine), None
    while time.monotonic() - begin < 600:
        if detected is None:
            found = machine.ask(f"flow_runs/{run}")
            if found["state"]["name"] in ("AwaitingRetry", "Late") or found["run_count"] > count:
                detected = time.monotonic() - begin
        if step(machine) > at:
            break
        time.sleep(0.2)
    resumed = time.monotonic() - begin
    machine.set_state(run, "CANCELLING", "Cancelling")
    if until(lambda: machine.unfinished() == 0 and not machine.strangers(), 180, every=1) is None:
        raise RuntimeError("the run did not end when it was cancelled")
    return {"detected_s": detected if detected is not None else resumed, "first_step_s": resumed}


def database(machine: Machine, postgres: Postgres | None, share: int) -> dict[str, float]:
    """Bytes in the database of one of each thing a stage sends, and of ten days of them."""
    os.environ |= {"PREFECT_API_URL": machine.api, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    os.environ["PREFECT_HOME"] = machine.env["PREFECT_HOME"]
    from prefect import flow, get_run_logger, runtime, task
    from prefect.artifacts import create_progress_artifact, update_progress_artifact
    from prefect.events import emit_event
    from prefect.settings import get_current_settings

    from flows import watch
    from nanochat_core.report import curve_png

    home = Path(machine.env["PREFECT_HOME"])

    def size() -> int:
        if postgres:
            return postgres.bytes()
        with sqlite3.connect(home / "prefect.db", timeout=60) as connection:
            pages = connection.execute("pragma page_count").fetchone()[0]
            free = connection.execute("pragma freelist_count").fetchone()[0]
            return int((pages - free) * connection.execute("pragma page_size").fetchone()[0])

    def settled() -> int:
        """The size once the server has written what it was sent."""
        last, since = size(), time.monotonic()
        while time.monotonic() - since < 6:
            time.sleep(0.5)
            if (now := size()) != last:
                last, since = now, time.monotonic()
        return last

    heartbeat = get_current_settings().flows.heartbeat_frequency or 30
    counts = {
        "log line": TEN_DAYS / watch.LOG_SECONDS,
        "progress": TEN_DAYS / watch.SLOW_PROGRESS_SECONDS,
        "curve": min(TEN_DAYS / watch.CURVE_SECONDS, 2 * watch.KEEP_CURVES),  # of each stage; two are long
        "heartbeat": min(TEN_DAYS, 7 * 86400.0) / heartbeat,
    }
    sent = {"log line": 2000, "progress": 300, "curve": 24, "heartbeat": 400}
    sent = {kind: max(8, n // share) for kind, n in sent.items()}
    rows = [
        {"step": i, "steps": 21400, "loss": 11 - i**0.2, "tokens_per_s": 1e4, "time": i} for i in range(5000)
    ]
    grown: dict[str, float] = {}

    @task(persist_result=False)
    def stage() -> None:
        log = get_run_logger()
        bar = create_progress_artifact(0.0, key="pretrain-progress", description="pretrain")

        def line(i: int) -> None:
            log.info(f"[pretrain] {i}/21400  30%  loss 3.212  10.3 k tok/s  bpb 0.934  3.1 days left")

        def progress(i: int) -> None:
            words = f"pretrain: {i}/21400 30%  loss 3.212  10.3 k tok/s  3.1 days left"
            update_progress_artifact(bar, 30.0, description=words)  # type: ignore[arg-type]

        def curve(i: int) -> None:
            text = f"![pretrain]({curve_png(rows, 'pretrain')})"
            watch.create_markdown_artifact(text, key="pretrain-curve", description="pretrain so far")

        def beat(i: int) -> None:
            me = {"prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}"}
            emit_event("prefect.flow-run.heartbeat", me | {"prefect.resource.name": "a-run"})

        senders = {"log line": line, "progress": progress, "curve": curve, "heartbeat": beat}
        for kind, send in senders.items():
            before = settled()
            for i in range(sent[kind]):
                send(i)
            time.sleep(4)  # loggers and emitters send in batches
            grown[kind] = max(0, settled() - before) / sent[kind]

    @flow(name="ten days at once", persist_result=False)
    def ten_days() -> None:
        stage()

    empty = settled()
    ten_days()
    whole = empty + sum(grown[kind] * counts[kind] for kind in grown)
    found = {f"{kind.replace(' ', '_')}_bytes": grown[kind] for kind in grown}
    return found | {
        "log_lines_in_ten_days": counts["log line"],
        "before_bytes": empty,
        "ten_days_bytes": whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--share", type=int, default=1, help="send only one in so many rows to the database")
    parser.add_argument("--postgres", action="store_true", help="a PostgreSQL instead of SQLite")
    parser.add_argument(
        "--only", nargs="+", choices=("overhead", "killed", "database"), help="leave the others out"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    parts = args.only or ["overhead", "killed", "database"]
    root = Path(tempfile.mkdtemp(prefix="nanochat-orchestration-"))
    root.chmod(0o755)
    postgres = Postgres(root) if args.postgres else None
    machine = Machine(root)
    if postgres:
        machine.env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = postgres.url
    numbers: dict[str, dict[str, float]] = {}
    try:
        begin = time.monotonic()
        machine.up()
        numbers["up"] = {"seconds": time.monotonic() - begin}
        machine.env["PREFECT_API_URL"] = machine.api  # `nanochat run` uses the server that is up
        if "overhead" in parts:
            numbers["overhead"] = overhead(machine, args.rounds)
        if "killed" in parts:
            numbers["flow process killed"] = killed(machine, lambda: machine.kill("flow"))
            numbers["worker told to stop"] = killed(machine, lambda: machine.kill("worker", number=15))

            def power() -> None:
                machine.power_cut()
                if postgres:
                    postgres.cut()
                    postgres.start()
                machine.env["PREFECT_API_URL"] = ""
                machine.up()
                machine.env["PREFECT_API_URL"] = machine.api

            numbers["power cut"] = killed(machine, power)
        if "database" in parts:
            numbers["database"] = database(machine, postgres, args.share)
    finally:
        machine.power_cut()
        if postgres:
            postgres.cut()
        shutil.rmtree(root, ignore_errors=True)
    print(f"{os.cpu_count()} cores, {'PostgreSQL' if postgres else 'SQLite'}")
    for part, found in numbers.items():
        for name, number in found.items():
            print(f"{part:<22}{name:<26}{number:>16,.2f}")
    if args.json:
        print(json.dumps({"database": "postgresql" if postgres else "sqlite"} | numbers))


if __name__ == "__main__":
    main()
