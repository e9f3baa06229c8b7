"""The reconciler: finds flow runs of ours whose process is gone, and puts the same runs back on the queue.

After a power cut Prefect shows a run as running for ever; its own automations guess by the clock and can
start a second trainer. This one goes by evidence. Of place: the worker that took the run bears this machine,
user and base directory in its name, or the flow's process left a record of this very attempt here; what is
not proven to be ours is never touched. Of life: the flow holds a lock that the kernel drops with it, and its
processes bear the run's id.
"""

import argparse
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort
from prefect.states import AwaitingRetry, Cancelled, Crashed, Failed

from flows.whose import WORKERS, worker_name
from nanochat_core.artifacts import store
from nanochat_core.runner import plan as plans

FLOW = "speedrun"
EVERY_SECONDS = 5.0
STARTING_SECONDS = (
    60.0  # between a run's being taken and its process: two imports of Prefect on a busy machine
)
GONE_SECONDS = 20.0  # for the worker to say it first: it knows the exit code
# A worker says that a process ended, has hooks run for ten seconds or more, and only then lets go of the run;
# one put back meanwhile is crashed again, or ends the worker that finds it twice in its hands.
CRASHED_SECONDS = 20.0
PROBE_SECONDS = 2.0  # a reconciler that looks whether a lock is free holds it for a moment
FRESH = timedelta(days=1)  # a run that crashed before that has been left lying by somebody
LONG_DUE = timedelta(days=1)
PATIENCE = 5  # crashes in a row at one and the same point, before a run is given up
CUTS = 50  # the same for power cuts: a run is not to blame for them, unless it trips the fuse each time
GONE = "its process is gone"
LIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
Evidence = Literal["alive", "gone", "elsewhere"]
T = TypeVar("T")


# What a flow's process leaves about itself, and its worker.


class Record(NamedTuple):
    """Who runs, or ran, an attempt of a flow run."""

    host: str
    user: int
    boot: str
    pid: int
    attempt: int  # Prefect's run_count: it grows with each attempt that begins to run
    services: str  # the base directory whose worker started it


def default_base_dir() -> Path:
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat").expanduser().absolute()


def folder(base_dir: Path) -> Path:
    return base_dir / "prefect" / "flows"


@contextlib.contextmanager
def present(base_dir: Path, flow_run: str, attempt: int) -> Iterator[None]:
    """Around a flow's body: hold the lock that says it lives, and note where. Prefect may have started a
    second process of the run; that one ends without a word to the API, for the first is at work."""
    path = folder(base_dir) / f"{flow_run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PROBE_SECONDS
    while True:
        with store.locked(path.with_suffix(".lock"), wait=False) as ours:
            if ours:
                here, services = socket.gethostname(), str(default_base_dir())
                me = Record(here, os.getuid(), boot_id(), os.getpid(), attempt, services)
                store.write_json(path, me._asdict())
                yield
                return
        if time.monotonic() > deadline:
            raise Abort(f"another process is at work on flow run {flow_run}; this one ends")
        time.sleep(0.05)


def boot_id() -> str:
    """This boot of this machine; a process of another boot is certainly gone. NANOCHAT_BOOT_ID is for drills:
    a power cut without one."""
    if drilled := os.environ.get("NANOCHAT_BOOT_ID"):
        return drilled
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


# What can be known of a run from here.


def read_record(base_dir: Path, flow_run: UUID) -> Record | None:
    try:
        return Record(**json.loads((folder(base_dir) / f"{flow_run}.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def evidence(own: Path, flow_run: FlowRun) -> Evidence:
    """Whether the process of a run lives. Nothing is concluded about what was not taken by this machine, user
    and base directory."""
    root = base_dir_of(flow_run, own)
    lock = folder(root) / f"{flow_run.id}.lock"
    if lock.exists():
        with store.locked(lock, wait=False) as free:
            if not free:
                return "alive"
    if has_process(flow_run.id):
        return "alive"
    return "gone" if taken_here(own, flow_run) else "elsewhere"


def taken_here(own: Path, flow_run: FlowRun) -> bool:
    """Whether the latest attempt of a run is proven to be of this machine, user and base directory."""
    worker = flow_run.labels.get("prefect.worker.name")
    if isinstance(worker, str) and worker.startswith(WORKERS):
        return worker == worker_name(own)
    root = base_dir_of(flow_run, own)
    record = of_this_attempt(flow_run, read_record(root, flow_run.id))
    return (
        record is not None
        and record.host == socket.gethostname()
        and record.user == os.getuid()
        and own.resolve() in (root.resolve(), Path(record.services).resolve())
    )


def of_this_attempt(flow_run: FlowRun, record: Record | None) -> Record | None:
    """The record if the run's latest attempt left it. One that is pending has left none yet: what is there is
    of the attempt before, and says nothing of who has taken it now."""
    if record is None or flow_run.state_type == StateType.PENDING:
        return None
    return record if record.attempt == flow_run.run_count else None


def has_process(flow_run: UUID) -> bool:
    """Whether a process of Prefect's for this run is here: the engine, what prepares it, or a hook. Stages do
    not inherit the variable."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run)
                and process.status() != "zombie"
                and any(Path(word).name.startswith("prefect") for word in process.cmdline())
            ):
                return True
    return False


def base_dir_of(flow_run: FlowRun, own: Path) -> Path:
    given = flow_run.parameters.get("base_dir")
    return Path(given).expanduser().absolute() if given else own


class Progress(NamedTuple):
    """How far a run has come."""

    where: str  # the row that is next, and the step of its checkpoint
    amount: int = 0  # in a row without checkpoints: its lines of metrics, and bytes downloaded


def progress(base_dir: Path, flow_run: FlowRun) -> Progress:
    """How far a run has come, by the disk."""
    given = flow_run.parameters
    try:
        plan = plans.load(
            given.get("profile", "cpu-demo"),
            given.get("overrides") or (),
            base_dir=base_dir,
            until=given.get("until"),
        )
    except ValueError as error:  # a plan that no longer loads makes no progress
        return Progress(str(error))
    verdicts = plans.explain(plan)
    undone = next((name for name, verdict in verdicts.items() if verdict.state != "hit"), "the end")
    at = verdicts[undone].step if undone in verdicts else None
    if given.get("rerun"):  # these are made beside what is there
        steps = (plans.saved_step(plans.rerun_path(plan.jobs[name])) for name in plan.jobs)
        at = at or next((step for step in steps if step is not None), None)
    if at is not None:
        return Progress(f"{undone} step {at}")
    rows = list(base_dir.glob(f"{undone}/*/metrics.jsonl"))
    files = [path for path in (base_dir / "downloads").rglob("*") if path.is_file()]
    lines = sum(path.read_bytes().count(b"\n") for path in rows)
    return Progress(undone, lines + sum(path.stat().st_size for path in files))


# The ledger of a run's crashes.


def ledger(base_dir: Path, flow_run: FlowRun) -> Path:
    return folder(base_dir) / f"{flow_run.id}.crashes.jsonl"


def note(base_dir: Path, flow_run: FlowRun, **line: Any) -> None:
    path = ledger(base_dir, flow_run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps({"time": round(time.time(), 3)} | line) + "\n")


def in_a_row(base_dir: Path, flow_run: FlowRun) -> tuple[int, int]:
    """How many crashes, and how many power cuts, there were since the run last came on, or was given up."""
    crashes = cuts = most = 0
    where = counted = None
    for text in ledger(base_dir, flow_run).read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a power cut
            continue
        if line["state"] == counted:  # noted twice: the reconciler was killed in between
            continue
        counted = line["state"]
        if "given_up" in line or line["where"] != where or line["amount"] > most:
            crashes = cuts = 0
        if "given_up" in line:
            continue
        where, most = line["where"], line["amount"]
        crashes, cuts = crashes + (not line["power_cut"]), cuts + line["power_cut"]
    return crashes, cuts


# Setting things right.


class Reconciler:
    """Looks again and again; how long it has seen a run so tells one that starts from one that is gone."""

    def __init__(self, client: SyncPrefectClient, base_dir: Path) -> None:
        self.client, self.base_dir = client, base_dir
        self.gone_since: dict[UUID, float] = {}  # state -> monotonic time, so that no clock is trusted
        self.said: set[str] = set()

    def look(self) -> list[str]:
        """One round; what was done, in words. One that cannot be judged keeps us from no other."""
        done = []
        runs = [run for run in self._suspects() if run.deployment_id is not None and run.state is not None]
        states = {run.state.id for run in runs if run.state is not None}
        self.gone_since = {state: since for state, since in self.gone_since.items() if state in states}
        for flow_run in runs:
            try:
                words = self._judge(flow_run)
            except Exception as error:
                words = f"{flow_run.name}: left alone: {type(error).__name__}: {error}"
                if words in self.said:
                    continue
                self.said.add(words)
            if words is not None:
                done.append(words)
        return done

    def _judge(self, flow_run: FlowRun) -> str | None:
        assert flow_run.state is not None
        if evidence(self.base_dir, flow_run) != "gone":
            self.gone_since.pop(flow_run.state.id, None)
            return None
        since = self.gone_since.setdefault(flow_run.state.id, time.monotonic())
        if time.monotonic() - since < self._wait(flow_run):
            return None
        root = base_dir_of(flow_run, self.base_dir)
        with store.locked(folder(root) / f"{flow_run.id}.recovery", wait=False) as ours:
            if ours and self._unchanged(flow_run):  # else another reconciler is at it, or was
                return self._settle(root, flow_run)
        return None

    def _wait(self, flow_run: FlowRun) -> float:
        """Seconds for which a run has to be seen without a process before it is settled."""
        if flow_run.state_type == StateType.PENDING:  # whatever an earlier attempt has left
            return STARTING_SECONDS
        if flow_run.state_type == StateType.CRASHED:
            return CRASHED_SECONDS
        return 0 if self._cut_off(flow_run) else GONE_SECONDS

    def _cut_off(self, flow_run: FlowRun) -> bool:
        """Whether the machine has been started since the run's process was: then it cannot be there."""
        if flow_run.state_type == StateType.CRASHED:  # somebody lived on to say so
            return False
        root = base_dir_of(flow_run, self.base_dir)
        record = of_this_attempt(flow_run, read_record(root, flow_run.id))
        return record is not None and record.host == socket.gethostname() and record.boot != boot_id()

    def _unchanged(self, flow_run: FlowRun) -> bool:
        now = self.client.read_flow_run(flow_run.id)
        same = now.state is not None and flow_run.state is not None and now.state.id == flow_run.state.id
        return same and now.labels == flow_run.labels

    def _settle(self, root: Path, flow_run: FlowRun) -> str:
        """Each step may be the last one: what is begun again finds what was done and does not do it twice."""
        assert flow_run.state is not None
        name = flow_run.name
        tasks = self._pages(
            lambda offset: self.client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])),
                task_run_filter=TaskRunFilter(
                    state=TaskRunFilterState(type=TaskRunFilterStateType(any_=LIVE))
                ),
                offset=offset,
            )
        )
        for task in tasks:
            lost: State[Any] = Crashed(message="the process that ran it is gone")
            self.client.set_task_run_state(task.id, lost, force=True)
        if flow_run.state_type == StateType.CANCELLING:
            self._set(flow_run, Cancelled(message="its process had ended before it could say so"))
            return f"{name}: cancelled"
        come = progress(root, flow_run)
        begun = flow_run.state_type == StateType.CRASHED and (flow_run.state.message or "").startswith(GONE)
        if not begun:
            note(
                root,
                flow_run,
                state=str(flow_run.state.id),
                power_cut=self._cut_off(flow_run),
                **come._asdict(),
            )
        crashes, cuts = in_a_row(root, flow_run)
        if crashes >= PATIENCE or cuts >= CUTS:
            what = f"{crashes} crashes" if crashes >= PATIENCE else f"{cuts} power cuts"
            words = f"given up after {what} in a row at {come.where}"
            note(root, flow_run, state=None, given_up=come.where)  # a Retry begins a new count
            self._set(flow_run, Failed(message=f"{words}; see its log, mend it, and press Retry"))
            return f"{name}: {words}"
        if not begun:
            self._set(flow_run, Crashed(message=f"{GONE}; it had come to {come.where}"))
        due = datetime.now(UTC) - LONG_DUE  # else a clock that is set back would have it wait for its time
        self._set(flow_run, AwaitingRetry(scheduled_time=due, message="put back by the reconciler"))
        return f"{name}: put back on the queue, to go on from {come.where}"

    def _set(self, flow_run: FlowRun, state: Any) -> None:
        self.client.set_flow_run_state(flow_run.id, state, force=True)

    def _suspects(self) -> list[FlowRun]:
        crashed = FlowRunFilterEndTime(after_=datetime.now(UTC) - FRESH)
        return self._runs(LIVE) + self._runs([StateType.CRASHED], end_time=crashed)

    def _runs(self, states: list[StateType], **more: Any) -> list[FlowRun]:
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=states))
        return self._pages(
            lambda offset: self.client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[FLOW])),
                flow_run_filter=FlowRunFilter(state=state, **more),
                offset=offset,
            )
        )

    def _pages(self, read: Callable[[int], list[T]]) -> list[T]:
        """All of a list that the API hands out in parts."""
        found: list[T] = []
        while part := read(len(found)):
            found += part
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Put runs whose process is gone back on the queue.")
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, metavar="SECONDS")
    every = parser.parse_args().every
    trouble = None
    with get_client(sync_client=True) as client:
        reconciler = Reconciler(client, default_base_dir())
        while True:
            try:
                lines, trouble = reconciler.look(), None
            except Exception as error:  # the server is away, or was asked too much: the next round comes
                lines = [] if str(error) == trouble else [f"not now: {error}"]
                trouble = str(error)
            for line in lines:
                print(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}", flush=True)
            time.sleep(every)


if __name__ == "__main__":
    main()
