"""The reconciler: finds flow runs of ours whose process is gone, and puts the same runs back on the queue.

After a power cut Prefect shows a run as running for ever; its own automations guess by the clock and can
start a second trainer. This one goes by evidence: each flow process holds a lock that the kernel drops with
it, and leaves a record of the machine it is on. Only runs of deployments, on this machine, are touched.
"""

import argparse
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed

from nanochat_core import plan as plans
from nanochat_core import store

FLOW = "speedrun"
EVERY_SECONDS = 10.0
STARTING_SECONDS = 20.0  # what lies between a run's being taken and its process being there
UNSEEN_SECONDS = 120.0  # the same for a run that has left no trace of where it was taken
FRESH = timedelta(days=1)  # a run that crashed before that has been left lying by somebody
LONG_DUE = timedelta(days=1)
PATIENCE = 5  # crashes in a row at one and the same step, before a run is given up
LIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
Evidence = Literal["alive", "gone", "elsewhere", "unseen"]


# What a flow's process leaves about itself.


def default_base_dir() -> Path:
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().absolute()


def folder(base_dir: Path) -> Path:
    return base_dir / "prefect" / "flows"


@contextlib.contextmanager
def present(base_dir: Path, flow_run: str) -> Iterator[None]:
    """Around a flow's body: hold the lock that says it lives, and note where."""
    path = folder(base_dir) / f"{flow_run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.locked(path.with_suffix(".lock"), wait=False):
        store.write_json(path, {"host": socket.gethostname(), "boot": boot_id(), "pid": os.getpid()})
        yield


def boot_id() -> str:
    """This boot of this machine; a process of another boot is certainly gone."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# What can be known of a run from here.


def evidence(base_dir: Path, flow_run: FlowRun) -> Evidence:
    """Whether the process of a run lives. Nothing is concluded about other machines."""
    path = folder(base_dir) / f"{flow_run.id}.json"
    host = socket.gethostname()
    taken_by = (flow_run.infrastructure_pid or "").rpartition(":")[0]
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        record = None
    if taken_by and taken_by != host:
        return "elsewhere"
    if record is not None and not taken_by and record["host"] != host:
        return "elsewhere"
    if has_engine(flow_run.id):
        return "alive"
    if record is None and not taken_by:
        return "unseen"
    if record is not None:
        with store.locked(path.with_suffix(".lock"), wait=False) as free:
            if not free:
                return "alive"
    return "gone"


def has_engine(flow_run: UUID) -> bool:
    """Whether a Prefect engine for this run is among the processes; its stages inherit the variable."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run)
                and process.status() != "zombie"
            ):
                words = process.cmdline()
                if "prefect.engine" in words or "flow-run" in words:
                    return True
    return False


def base_dir_of(flow_run: FlowRun) -> Path:
    given = flow_run.parameters.get("base_dir")
    return Path(given).expanduser().absolute() if given else default_base_dir()


def progress(base_dir: Path, flow_run: FlowRun) -> str:
    """How far a run has come, by the disk: which rows are done, and the step of the next one's checkpoint."""
    given = flow_run.parameters
    plan = plans.load(
        given.get("profile", "cpu-demo"),
        given.get("overrides") or (),
        base_dir=base_dir,
        until=given.get("until"),
    )
    verdicts = plans.explain(plan)
    undone = next((name for name, verdict in verdicts.items() if verdict.state != "hit"), "the end")
    at = verdicts[undone].step if undone in verdicts else None
    if given.get("rerun"):  # these are made beside what is there
        steps = (plans.saved_step(plans.rerun_path(plan.jobs[name])) for name in plan.jobs)
        at = at or next((step for step in steps if step is not None), None)
    return undone + (f" step {at}" if at is not None else "")


def note_crash(base_dir: Path, flow_run: FlowRun) -> tuple[int, str]:
    """Add a crash to the run's ledger; how many in a row it has had at this very point, and the point."""
    try:
        where = progress(base_dir, flow_run)
    except ValueError as error:  # a plan that no longer loads makes no progress
        where = str(error)
    ledger = folder(base_dir) / f"{flow_run.id}.crashes.jsonl"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    with ledger.open("a") as f:
        f.write(json.dumps({"time": round(time.time(), 3), "where": where}) + "\n")
    row = 0
    for line in reversed(ledger.read_text().splitlines()):
        if json.loads(line)["where"] != where:
            break
        row += 1
    return row, where


# Setting things right.


class Reconciler:
    """Looks again and again; what it saw last time tells a run that starts from one that is gone."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self.gone_since: dict[str, float] = {}  # state id -> monotonic time, so that no clock is trusted

    def look(self) -> list[str]:
        """One round; what was done, in words."""
        done = []
        suspects = self._runs(LIVE) + [run for run in self._runs([StateType.CRASHED]) if fresh(run)]
        for flow_run in suspects:
            if flow_run.deployment_id is None or flow_run.state is None:
                continue
            root = base_dir_of(flow_run)
            found = evidence(root, flow_run)
            key = str(flow_run.state.id)
            if found not in ("gone", "unseen"):
                self.gone_since.pop(key, None)
                continue
            since = self.gone_since.setdefault(key, time.monotonic())
            if not self._sure(flow_run, found, time.monotonic() - since):
                continue
            with store.locked(folder(root) / f"{flow_run.id}.recovery", wait=False) as ours:
                if ours and self._unchanged(flow_run):  # else another reconciler is at it, or was
                    done.append(self._settle(root, flow_run))
        return done

    def _sure(self, flow_run: FlowRun, found: Evidence, seconds: float) -> bool:
        if found == "unseen":
            return seconds >= UNSEEN_SECONDS
        record = folder(base_dir_of(flow_run)) / f"{flow_run.id}.json"
        with contextlib.suppress(OSError, ValueError):
            if json.loads(record.read_text())["boot"] != boot_id():
                return True  # the machine has been started since: no process of that run can be there
        return seconds >= (0 if flow_run.state_type == StateType.CRASHED else STARTING_SECONDS)

    def _unchanged(self, flow_run: FlowRun) -> bool:
        now = self.client.read_flow_run(flow_run.id)
        return now.state is not None and flow_run.state is not None and now.state.id == flow_run.state.id

    def _settle(self, root: Path, flow_run: FlowRun) -> str:
        name = flow_run.name
        for task in self.client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        ):
            if task.state is not None and not task.state.is_final():
                lost: State[Any] = Crashed(message="the process that ran it is gone")
                self.client.set_task_run_state(task.id, lost, force=True)
        if flow_run.state_type == StateType.CANCELLING:
            self._set(flow_run, Cancelled(message="its process had ended before it could say so"))
            return f"{name}: cancelled"
        row, where = note_crash(root, flow_run)
        if row >= PATIENCE:
            self._set(flow_run, Failed(message=f"given up after {row} crashes in a row at {where}"))
            return f"{name}: given up after {row} crashes in a row at {where}"
        self._set(flow_run, Crashed(message=f"its process is gone; it had come to {where}"))
        due = datetime.now(UTC) - LONG_DUE  # else a clock that is set back would have it wait for its time
        self._set(flow_run, AwaitingRetry(scheduled_time=due, message="put back by the reconciler"))
        return f"{name}: put back on the queue, to go on from {where}"

    def _set(self, flow_run: FlowRun, state: Any) -> None:
        self.client.set_flow_run_state(flow_run.id, state, force=True)

    def _runs(self, states: list[StateType]) -> list[FlowRun]:
        return self.client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
        )


def fresh(flow_run: FlowRun) -> bool:
    ended = flow_run.end_time or (flow_run.state.timestamp if flow_run.state else None)
    return ended is not None and datetime.now(UTC) - ended < FRESH


def main() -> None:
    parser = argparse.ArgumentParser(description="Put runs whose process is gone back on the queue.")
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, metavar="SECONDS")
    every = parser.parse_args().every
    with get_client(sync_client=True) as client:
        reconciler = Reconciler(client)
        while True:
            try:
                for line in reconciler.look():
                    print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}", flush=True)
            except Exception as error:  # the server is away, or was asked too much: the next round comes
                print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} not now: {error}", flush=True)
            time.sleep(every)


if __name__ == "__main__":
    main()
