"""The reconciler on a real server: what it puts back on the queue, what it leaves alone."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort
from prefect.states import AwaitingRetry, Cancelling, Completed, Crashed, Pending, Running
from toys import PROFILE, Toy

from flows import recovery
from flows.recovery import Reconciler, boot_id, folder, present
from flows.speedrun import speedrun
from flows.whose import worker_name
from nanochat_core.artifacts import store

pytestmark = pytest.mark.usefixtures("prefect_server")


@task
def a_task() -> None:
    """What was at work when the power went."""


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found
        while runs := [run for run in found.read_flow_runs() if run.state and not run.state.is_completed()]:
            for run in runs:
                found.set_flow_run_state(run.id, Completed(), force=True)


@pytest.fixture
def deployment(client: SyncPrefectClient) -> UUID:
    return client.create_deployment(client.create_flow(speedrun), f"test-{uuid4()}")


def taken(
    client: SyncPrefectClient,
    deployment: UUID,
    toy: Toy,
    state: State[Any],
    *,
    boot: str | None = "another",
    host: str | None = None,
    base_dir: str | None = None,
    worker: str = "ProcessWorker 37a1",
) -> FlowRun:
    """A run as Prefect's process worker leaves it, which writes its own name and a bare process id, with the
    record its flow left here: by default one of an earlier boot."""
    run = client.create_flow_run_from_deployment(
        deployment, parameters={"profile": str(PROFILE), "base_dir": base_dir or str(toy.base_dir)}
    )
    client.update_flow_run(run.id, infrastructure_pid="4711")
    client.update_flow_run_labels(run.id, {"prefect.worker.name": worker})
    client.set_flow_run_state(run.id, state, force=True)
    if boot is not None:
        remember(client, run, toy.base_dir, boot, host or socket.gethostname())
    return client.read_flow_run(run.id)


def remember(
    client: SyncPrefectClient, run: FlowRun, base_dir: Path, boot: str, host: str, services: str = "/nowhere"
) -> None:
    """What a flow leaves of its latest attempt."""
    folder(base_dir).mkdir(parents=True, exist_ok=True)
    attempt = client.read_flow_run(run.id).run_count
    record = recovery.Record(host, os.getuid(), boot, 4711, attempt, services)
    (folder(base_dir) / f"{run.id}.json").write_text(json.dumps(record._asdict()))


def cut_off_again(client: SyncPrefectClient, run: FlowRun, toy: Toy, boot: str = "another") -> None:
    """The next attempt has begun to work, and the power went."""
    client.set_flow_run_state(run.id, Running(), force=True)
    remember(client, run, toy.base_dir, boot, socket.gethostname())


def looks(client: SyncPrefectClient, toy: Toy) -> list[str]:
    """One round of a reconciler of the toy's base directory."""
    return Reconciler(client, toy.base_dir).look()


def state_of(client: SyncPrefectClient, run: FlowRun) -> str:
    state = client.read_flow_run(run.id).state
    assert state is not None
    return state.name


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits: what is gone is settled at the first look."""
    for wait in ("STARTING_SECONDS", "GONE_SECONDS", "CRASHED_SECONDS"):
        monkeypatch.setattr(recovery, wait, 0.0)


def test_a_run_cut_off_by_a_power_cut_goes_back_on_the_queue(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    toy.make(toy.plan(until="shards"))
    run = taken(client, deployment, toy, Running())
    at_work = client.create_task_run(a_task, flow_run_id=run.id, dynamic_key="1", state=Running())
    assert looks(client, toy) == [f"{run.name}: put back on the queue, to go on from pretrain"]
    assert state_of(client, run) == "AwaitingRetry"
    after = client.read_task_run(at_work.id).state
    assert after is not None and after.type == StateType.CRASHED
    assert looks(client, toy) == []


def test_a_run_put_back_is_left_alone_while_its_worker_starts_it(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    """The record is still that of the boot before; only the new process writes another."""
    run = taken(client, deployment, toy, Running(), worker=worker_name(toy.base_dir))
    reconciler = Reconciler(client, toy.base_dir)
    assert len(reconciler.look()) == 1
    for state in (Pending(), Pending(name="Submitting"), Running()):  # Running: not yet in the flow's body
        client.set_flow_run_state(run.id, state, force=True)
        assert reconciler.look() == [] and looks(client, toy) == []  # a new reconciler too
        assert state_of(client, run) == state.name
    with present(toy.base_dir, str(run.id), client.read_flow_run(run.id).run_count):
        assert reconciler.look() == []


@pytest.mark.usefixtures("impatient")
def test_a_run_cut_off_between_the_queue_and_its_process_goes_back(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Pending(), boot=None, worker=worker_name(toy.base_dir))
    assert "put back" in looks(client, toy)[0]
    assert state_of(client, run) == "AwaitingRetry"


def test_a_run_whose_process_lives_is_left_alone(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, impatient: None
) -> None:
    run = taken(client, deployment, toy, Running(), worker=worker_name(toy.base_dir))
    with present(toy.base_dir, str(run.id), 1):
        assert looks(client, toy) == []
    assert state_of(client, run) == "Running"
    starting = taken(client, deployment, toy, Pending(), worker=worker_name(toy.base_dir))
    code = "import time; print('here', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, "prefect.runner._workspace_supervisor"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PREFECT__FLOW_RUN_ID": str(starting.id)},
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        looks(client, toy)
        assert state_of(client, starting) == "Pending"
        process.kill()
    looks(client, toy)
    assert state_of(client, starting) == "AwaitingRetry"


def test_a_process_that_ended_in_this_boot_is_given_time_for_its_worker_to_say_so(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = taken(client, deployment, toy, Running(), boot=None)
    with present(toy.base_dir, str(run.id), run.run_count):
        pass
    reconciler = Reconciler(client, toy.base_dir)
    assert reconciler.look() == []
    monkeypatch.setattr(recovery, "GONE_SECONDS", 0.0)
    assert len(reconciler.look()) == 1


@pytest.mark.usefixtures("impatient")
def test_a_run_that_is_not_proven_to_be_ours_is_never_touched(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, tmp_path: Path
) -> None:
    """A live run of another machine looks exactly so from here: a bare process id that is none of ours."""
    other = worker_name(tmp_path / "another base")
    runs = [
        taken(client, deployment, toy, Running(), boot=None),  # no trace here
        taken(client, deployment, toy, Pending(), boot=None, worker="KubernetesWorker 5e"),
        taken(client, deployment, toy, Pending(), worker="ProcessWorker 5e"),  # it was here an attempt ago
        taken(client, deployment, toy, Running(), host="elsewhere"),
        taken(client, deployment, toy, Running(), worker=other),  # of a base directory that shares the queue
        taken(client, deployment, toy, Running(), base_dir=str(tmp_path / "another base")),
    ]
    again = taken(client, deployment, toy, Running())
    client.set_flow_run_state(again.id, Running(), force=True)  # its next attempt is on another machine
    before = {run.id: state_of(client, run) for run in [*runs, again]}
    reconciler = Reconciler(client, toy.base_dir)
    assert reconciler.look() == [] and reconciler.look() == []
    assert {run.id: state_of(client, run) for run in [*runs, again]} == before


@pytest.mark.usefixtures("impatient")
def test_a_run_whose_base_directory_was_given_in_the_form_is_its_workers_to_recover(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, tmp_path: Path
) -> None:
    services = tmp_path / "services"
    run = taken(client, deployment, toy, Running())
    remember(client, run, toy.base_dir, "another", socket.gethostname(), services=str(services))
    assert Reconciler(client, tmp_path / "others").look() == []
    assert len(Reconciler(client, services).look()) == 1


def test_a_cancelled_run_stays_cancelled(client: SyncPrefectClient, deployment: UUID, toy: Toy) -> None:
    run = taken(client, deployment, toy, Running())
    client.set_flow_run_state(run.id, Cancelling(), force=True)
    assert looks(client, toy) == [f"{run.name}: cancelled"]
    assert state_of(client, run) == "Cancelled"


def test_a_finished_run_and_one_started_by_hand_are_not_touched(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    finished = taken(client, deployment, toy, Completed())
    by_hand = client.create_flow_run(speedrun, parameters={"base_dir": str(toy.base_dir)}, state=Running())
    remember(client, by_hand, toy.base_dir, "another", socket.gethostname())
    assert looks(client, toy) == []
    assert state_of(client, finished) == "Completed" and state_of(client, by_hand) == "Running"


@pytest.mark.usefixtures("impatient")
def test_crashes_without_progress_end_in_a_clear_failure_and_a_retry_counts_anew(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Running(), boot=boot_id())
    for _ in range(2):
        for _ in range(recovery.PATIENCE - 1):
            assert "put back" in looks(client, toy)[0]
            cut_off_again(client, run, toy, boot_id())
        assert looks(client, toy) == [f"{run.name}: given up after 5 crashes in a row at shards"]
        assert client.read_flow_run(run.id).state_type == StateType.FAILED
        client.set_flow_run_state(run.id, AwaitingRetry(), force=True)  # what the UI's Retry does
        cut_off_again(client, run, toy, boot_id())


def test_power_cuts_are_not_held_against_a_run(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = taken(client, deployment, toy, Running())
    for _ in range(2 * recovery.PATIENCE):
        assert "put back" in looks(client, toy)[0]
        cut_off_again(client, run, toy)
    monkeypatch.setattr(recovery, "CUTS", 2 * recovery.PATIENCE + 1)  # but a run that trips the fuse ends
    assert looks(client, toy) == [f"{run.name}: given up after 11 power cuts in a row at shards"]


@pytest.mark.usefixtures("impatient")
def test_progress_between_crashes_starts_the_count_anew(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Running(), boot=boot_id())
    made = toy.plan()
    for crash in range(2 * recovery.PATIENCE):  # bytes that arrive, of a stage without steps
        (toy.base_dir / "downloads").mkdir(parents=True, exist_ok=True)
        (toy.base_dir / "downloads" / "shard.part").write_bytes(bytes(crash))
        assert looks(client, toy) == [f"{run.name}: put back on the queue, to go on from shards"]
        cut_off_again(client, run, toy, boot_id())
    toy.make(toy.plan(until="shards"))
    for crash in range(2 * recovery.PATIENCE):
        (made.jobs["pretrain"].path / "checkpoints" / f"step_{crash:08d}").mkdir(parents=True)
        assert looks(client, toy) == [
            f"{run.name}: put back on the queue, to go on from pretrain step {crash}"
        ]
        cut_off_again(client, run, toy, boot_id())


def test_two_reconcilers_do_it_once(client: SyncPrefectClient, deployment: UUID, toy: Toy) -> None:
    run = taken(client, deployment, toy, Running())
    with store.locked(folder(toy.base_dir) / f"{run.id}.recovery"):
        assert looks(client, toy) == []
    assert len(looks(client, toy)) == 1
    assert len(recovery.ledger(toy.base_dir, run).read_text().splitlines()) == 1


@pytest.mark.usefixtures("impatient")
def test_a_reconciler_killed_in_the_midst_counts_no_crash_twice(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = taken(client, deployment, toy, Running(), boot=boot_id())
    reconciler = Reconciler(client, toy.base_dir)
    really, said = reconciler._set, []

    def dying(flow_run: FlowRun, state: State[Any]) -> None:
        if said:
            raise KeyboardInterrupt
        said.append(state.name)
        really(flow_run, state)

    monkeypatch.setattr(reconciler, "_set", dying)
    with pytest.raises(KeyboardInterrupt):
        reconciler.look()
    assert state_of(client, run) == "Crashed"
    assert "put back" in looks(client, toy)[0]
    assert state_of(client, run) == "AwaitingRetry"
    assert recovery.in_a_row(toy.base_dir, run) == (1, 0)


def test_a_run_that_cannot_be_judged_keeps_nobody_from_recovery_and_is_told_once(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = taken(client, deployment, toy, Running())
    bad = taken(client, deployment, toy, Running(), worker=worker_name(toy.base_dir), base_dir="/proc/nope")
    after = taken(client, deployment, toy, Running())
    monkeypatch.setattr(recovery, "GONE_SECONDS", 0.0)
    reconciler = Reconciler(client, toy.base_dir)
    told = reconciler.look()
    assert len(told) == 3 and any(bad.name in line and "/proc/nope" in line for line in told)
    assert state_of(client, before) == state_of(client, after) == "AwaitingRetry"
    assert reconciler.look() == []


def test_what_fills_more_than_a_page_is_settled_whole(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = taken(client, deployment, toy, Running())
    for number in range(5):
        client.create_task_run(a_task, flow_run_id=run.id, dynamic_key=str(number), state=Running())
    others = [taken(client, deployment, toy, Crashed()) for _ in range(3)]
    tasks, runs = client.read_task_runs, client.read_flow_runs
    monkeypatch.setattr(client, "read_task_runs", lambda **more: tasks(**more, limit=2))
    monkeypatch.setattr(client, "read_flow_runs", lambda **more: runs(**more, limit=2))
    monkeypatch.setattr(recovery, "CRASHED_SECONDS", 0.0)
    assert len(looks(client, toy)) == 1 + len(others)
    own = tasks(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
    assert len(own) == 5 and all(task.state and task.state.is_crashed() for task in own)


def test_a_second_process_of_a_run_ends_and_leaves_the_first_one_alone(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "PROBE_SECONDS", 0.1)
    run = uuid4()
    with present(toy.base_dir, str(run), 1):
        with pytest.raises(Abort, match="another process is at work"), present(toy.base_dir, str(run), 2):
            pass
        left = recovery.read_record(toy.base_dir, run)
        assert left is not None and left.attempt == 1


def test_a_workers_name_is_one_that_prefect_takes(toy: Toy) -> None:
    from prefect.workers.process import ProcessWorker

    name = worker_name(toy.base_dir)
    assert ProcessWorker(work_pool_name="nanochat", name=name).name == name
    assert worker_name(toy.base_dir / "other") != name


def test_every_profile_has_its_deployment() -> None:
    import yaml

    from nanochat_core.machine.installed import deployment
    from nanochat_core.runner.plan import profile_names

    deployments = yaml.safe_load(deployment("prefect.yaml").read_text())["deployments"]
    ours = [d for d in deployments if d["entrypoint"] == "flows.speedrun.speedrun"]
    assert [d["parameters"]["profile"] for d in ours] == [d["name"] for d in ours]
    assert {d["name"] for d in ours} == set(profile_names())
    assert {d["name"] for d in deployments} - {d["name"] for d in ours} == {"own-text"}
    assert all("concurrency_limit" not in d and d["description"] for d in deployments)
