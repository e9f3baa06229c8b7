"""The reconciler on a real server: what it puts back on the queue, what it leaves alone."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelling, Completed, Pending, Running
from toys import PROFILE, Toy

from flows import recovery
from flows.recovery import Reconciler, folder, present
from flows.speedrun import speedrun
from nanochat_core import store

pytestmark = pytest.mark.usefixtures("prefect_server")


@task
def a_task() -> None:
    """What was at work when the power went."""


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found
        for run in found.read_flow_runs():
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
    **by: str,
) -> FlowRun:
    """A run that Prefect believes in, with the record its process left: by default one of an earlier boot."""
    run = client.create_flow_run_from_deployment(
        deployment, parameters={"profile": str(PROFILE), "base_dir": str(toy.base_dir)}
    )
    client.update_flow_run(
        run.id, infrastructure_pid=f"{by.get('host', socket.gethostname())}:1" if boot else None
    )
    client.set_flow_run_state(run.id, state, force=True)
    if boot is not None:
        where = folder(toy.base_dir)
        where.mkdir(parents=True, exist_ok=True)
        record = {"host": socket.gethostname(), "boot": boot, "pid": 1} | by
        (where / f"{run.id}.json").write_text(json.dumps(record))
    return client.read_flow_run(run.id)


def state_of(client: SyncPrefectClient, run: FlowRun) -> str:
    state = client.read_flow_run(run.id).state
    assert state is not None
    return state.name


def test_a_run_cut_off_by_a_power_cut_goes_back_on_the_queue(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    toy.make(toy.plan(until="shards"))
    run = taken(client, deployment, toy, Running())
    at_work = client.create_task_run(a_task, flow_run_id=run.id, dynamic_key="1", state=Running())
    done = Reconciler(client).look()
    assert done == [f"{run.name}: put back on the queue, to go on from pretrain"]
    assert state_of(client, run) == "AwaitingRetry"
    after = client.read_task_run(at_work.id).state
    assert after is not None and after.type == StateType.CRASHED
    assert Reconciler(client).look() == []


def test_a_run_whose_process_lives_is_left_alone(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Running(), boot=None)
    with present(toy.base_dir, str(run.id)):
        assert Reconciler(client).look() == []
    assert state_of(client, run) == "Running"


def test_a_process_that_ended_in_this_boot_is_given_time_to_be_starting(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = taken(client, deployment, toy, Running(), boot=None)
    with present(toy.base_dir, str(run.id)):
        pass
    reconciler = Reconciler(client)
    assert reconciler.look() == []
    monkeypatch.setattr(recovery, "STARTING_SECONDS", 0.0)
    assert len(reconciler.look()) == 1


def test_a_run_on_another_machine_is_not_ours_to_judge(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Running(), host="elsewhere")
    assert Reconciler(client).look() == []
    assert state_of(client, run) == "Running"


def test_a_run_that_left_no_trace_is_waited_for_longer(
    client: SyncPrefectClient, deployment: UUID, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken(client, deployment, toy, Pending(), boot=None)
    monkeypatch.setattr(recovery, "STARTING_SECONDS", 0.0)
    reconciler = Reconciler(client)
    assert reconciler.look() == [] and reconciler.look() == []
    monkeypatch.setattr(recovery, "UNSEEN_SECONDS", 0.0)
    assert len(reconciler.look()) == 1


def test_a_cancelled_run_stays_cancelled(client: SyncPrefectClient, deployment: UUID, toy: Toy) -> None:
    run = taken(client, deployment, toy, Cancelling())
    assert Reconciler(client).look() == [f"{run.name}: cancelled"]
    assert state_of(client, run) == "Cancelled"


def test_a_finished_run_and_one_started_by_hand_are_not_touched(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    finished = taken(client, deployment, toy, Completed())
    by_hand = client.create_flow_run(speedrun, parameters={"base_dir": str(toy.base_dir)}, state=Running())
    assert Reconciler(client).look() == []
    assert state_of(client, finished) == "Completed" and state_of(client, by_hand) == "Running"


def test_crashes_without_progress_end_in_a_clear_failure(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Running())
    for _ in range(recovery.PATIENCE - 1):
        assert "put back" in Reconciler(client).look()[0]
        client.set_flow_run_state(run.id, Running(), force=True)
    assert Reconciler(client).look() == [f"{run.name}: given up after 5 crashes in a row at shards"]
    assert client.read_flow_run(run.id).state_type == StateType.FAILED


def test_progress_between_crashes_starts_the_count_anew(
    client: SyncPrefectClient, deployment: UUID, toy: Toy
) -> None:
    run = taken(client, deployment, toy, Running())
    checkpoints = toy.plan().jobs["pretrain"].path / "checkpoints"
    for crash in range(2 * recovery.PATIENCE):
        (checkpoints / f"step_{crash:08d}").mkdir(parents=True)
        if crash == 0:
            toy.make(toy.plan(until="shards"))
        assert Reconciler(client).look() == [
            f"{run.name}: put back on the queue, to go on from pretrain step {crash}"
        ]
        client.set_flow_run_state(run.id, Running(), force=True)
    client.set_flow_run_state(run.id, Completed(), force=True)


def test_two_reconcilers_do_it_once(client: SyncPrefectClient, deployment: UUID, toy: Toy) -> None:
    run = taken(client, deployment, toy, Running())
    with store.locked(folder(toy.base_dir) / f"{run.id}.recovery"):
        assert Reconciler(client).look() == []
    assert len(Reconciler(client).look()) == 1
    ledger = folder(toy.base_dir) / f"{run.id}.crashes.jsonl"
    assert len(ledger.read_text().splitlines()) == 1


def test_every_profile_has_its_deployment() -> None:
    import yaml

    from flows.services import DEPLOYMENTS
    from nanochat_core.plan import profile_names

    deployments = yaml.safe_load(Path(DEPLOYMENTS).read_text())["deployments"]
    ours = [d for d in deployments if d["entrypoint"] == "flows.speedrun.speedrun"]
    assert [d["parameters"]["profile"] for d in ours] == [d["name"] for d in ours]
    assert {d["name"] for d in ours} == set(profile_names())
    assert {d["name"] for d in deployments} - {d["name"] for d in ours} == {"own-text"}
    assert all("concurrency_limit" not in d and d["description"] for d in deployments)
