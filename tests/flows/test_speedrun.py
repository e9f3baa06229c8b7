"""The flow over the toy table, on a real server: what runs, what is cached, what the UI is told."""

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import Artifact, FlowRun, State, TaskRun
from prefect.states import Cancelling
from toys import PROFILE, Toy

from flows import watch
from flows.speedrun import CostRefused, speedrun
from nanochat_core.runner import plan as plans
from nanochat_core.runner.launch import StageFailed

pytestmark = pytest.mark.usefixtures("prefect_server")
ROWS = ["shards", "pretrain", "base_loss", "mid", "sft", "sft_eval", "report"]


OWN = """
from nanochat_core.artifacts.stage import Recipe

ROW = {"reads": {"model": "sft"}}


class Config(Recipe):
    pass


def run(cfg, job):
    return {"shine": 1}
"""


def run(toy: Toy, *overrides: str, **options: Any) -> State[Any]:
    state: State[Any] = speedrun(
        profile=str(PROFILE), overrides=overrides, base_dir=str(toy.base_dir), return_state=True, **options
    )
    return state


def flow_run_of(state: State[Any]) -> FlowRun:
    assert state.state_details.flow_run_id is not None
    with get_client(sync_client=True) as client:
        return client.read_flow_run(state.state_details.flow_run_id)


def task_runs(state: State[Any], wanted: int = len(ROWS)) -> list[TaskRun]:
    """The flow run's task runs in order, once the server has heard of all of them."""
    found: list[TaskRun] = []
    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_of(state).id]))
    for _ in range(100):
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(flow_run_filter=only)
        if len(found) == wanted and all(task.state and task.state.is_final() for task in found):
            break
        time.sleep(0.1)
    return sorted(found, key=lambda task: task.expected_start_time or task.created or 0)


def names(state: State[Any], wanted: int = len(ROWS)) -> dict[str, str]:
    return {task.name: task.state.name if task.state else "" for task in task_runs(state, wanted)}


def artifacts(key: str) -> list[Artifact]:
    for _ in range(50):
        with get_client(sync_client=True) as client:
            found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key])))
        if found:
            return found
        time.sleep(0.1)
    return []


def test_a_task_run_for_each_row_with_the_tables_edges(toy: Toy) -> None:
    state = run(toy)
    assert state.is_completed()
    tasks = task_runs(state)
    assert {task.name for task in tasks} == set(ROWS)
    by_id = {task.id: task.name for task in tasks}
    edges = {
        task.name: {by_id[source.id] for source in task.task_inputs["reads"] if isinstance(source.id, UUID)}
        for task in tasks
    }
    assert edges["shards"] == set()
    assert edges["sft"] == {"mid"}
    assert edges["base_loss"] == {"pretrain", "shards"}
    assert edges["report"] == set(ROWS) - {"report"}
    result = state.result()
    assert result["pretrain"]["val_bpb"] == 1.5
    assert flow_run_of(state).parameters["profile"] == str(PROFILE)


def test_a_second_run_is_cached_whole_and_a_deleted_artefact_runs_alone(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    run(toy)
    again = run(toy)
    assert again.is_completed() and set(names(again).values()) == {"Cached"}
    shutil.rmtree(made.jobs["mid"].path)
    third = run(toy)
    assert {row for row, name in names(third).items() if name != "Cached"} == {"mid"}
    assert toy.starts(made, "mid") == ["0", "0"] and toy.starts(made, "pretrain") == ["0"]


def test_an_artefact_that_prefect_forgot_is_adopted(toy: Toy) -> None:
    toy.make(toy.plan())
    state = run(toy)
    assert set(names(state).values()) == {"Adopted"}
    shutil.rmtree(toy.base_dir / "prefect")
    assert set(names(run(toy)).values()) == {"Adopted"}


def test_a_changed_recipe_runs_what_follows_only(toy: Toy) -> None:
    toy.make(toy.plan())
    state = run(toy, "sft.steps=3")
    assert {row for row, name in names(state).items() if name == "Completed"} == {"sft", "sft_eval", "report"}


def test_a_stage_of_ones_own_has_a_task_run_of_its_name(toy: Toy, tmp_path: Path) -> None:
    toy.make(toy.plan(until="sft"))
    (tmp_path / "my_stage.py").write_text(OWN)
    state = run(toy, f'profile.stages=["{tmp_path}/my_stage.py:polish"]', until="polish", rerun=["polish"])
    assert state.result()["polish"] == {"shine": 1}
    assert names(state, wanted=6)["polish"] == "Completed"


def test_the_parameters_let_any_stage_be_named() -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(speedrun.fn).model_dump()["properties"]
    assert "enum" not in json.dumps([schema["until"], schema["rerun"]])


def test_the_rerun_parameter_makes_a_stage_again(toy: Toy) -> None:
    toy.make(toy.plan())
    state = run(toy, rerun=["sft"])
    rerun = {row for row, name in names(state).items() if name == "Completed"}
    assert rerun == {"sft", "sft_eval", "report"}
    assert len(toy.starts(toy.plan(), "pretrain")) == 1


def test_until_ends_there(toy: Toy) -> None:
    toy.make(toy.plan(), "shards")
    state = run(toy, until="pretrain")
    assert set(state.result()) == {"shards", "pretrain"}


def test_a_stage_that_fails_fails_the_run_and_keeps_what_was_done(toy: Toy) -> None:
    toy.make(toy.plan(), "shards")
    state = run(toy, "mid.fail_at=2")
    assert state.is_failed() and "the loss is not finite at step 2" in (state.message or "")
    with pytest.raises(StageFailed):
        state.result()
    assert plans.explain(toy.plan())["pretrain"].state == "hit"


def test_a_workers_run_that_fails_says_in_a_sentence_what_and_how_to_go_on(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "one")  # where a worker starts it
    toy.make(toy.plan(until="base_loss"))
    failed = run(toy, "mid.fail_at=2")
    again = f"prefect flow-run retry {flow_run_of(failed).id}"
    command = f"nanochat run {PROFILE} --base-dir {toy.base_dir} --set mid.fail_at=2"
    assert failed.is_failed() and "the loss is not finite at step 2" in (failed.message or "")
    assert (failed.message or "").endswith(f"press Retry in the UI, or: {again}, or: {command}")
    refused = run(toy, "pretrain.deph=3")
    assert (
        refused.is_failed() and "deph" in (refused.message or "") and "Retry" not in (refused.message or "")
    )
    with get_client(sync_client=True) as client:
        for _ in range(100):
            logs = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_of(refused).id])))
            if logs:
                break
            time.sleep(0.1)
    assert any(line.message == refused.message for line in logs)
    assert not any("Traceback" in line.message for line in logs)


def test_dear_work_is_not_left_unused_unless_accepted(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    record = made.jobs["pretrain"].path / "result.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 9000.0}))
    state = run(toy, "pretrain.depth=3")
    with pytest.raises(CostRefused, match=r"pretrain runs again: pretrain.depth: 2 -> 3; 2:30 h of work"):
        state.result()
    assert run(toy, "pretrain.depth=3", accept_cost=True, until="pretrain").is_completed()


def test_the_ui_is_told_how_far_a_stage_is(toy: Toy) -> None:
    made = toy.plan(until="sft")
    toy.make(made)
    for name in ("pretrain", "sft"):
        shutil.rmtree(made.jobs[name].path)
    run(toy, until="sft")
    bar = artifacts("pretrain-progress")[0]
    assert bar.data == 100.0 and "6/6" in (bar.description or "") and "loss" in (bar.description or "")
    curve = artifacts("sft-curve")[0]
    assert "data:image/png;base64," in str(curve.data) and "| loss |" in str(curve.data)


def test_a_server_in_trouble_does_not_disturb_the_training(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **more: Any) -> None:
        raise ConnectionError("away")

    for name in (
        "create_progress_artifact",
        "update_progress_artifact",
        "create_markdown_artifact",
        "get_client",
    ):
        monkeypatch.setattr(watch, name, broken)
    monkeypatch.setattr(watch, "CANCEL_SECONDS", 0.05)
    toy.make(toy.plan(), "shards")
    assert run(toy, "pretrain.pause=0.05", until="pretrain").is_completed()


def test_a_cancelled_run_stops_with_a_checkpoint(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CANCEL_SECONDS", 0.2)
    slow = ("pretrain.steps=1000", "pretrain.pause=0.02")
    made = toy.plan(*slow)
    toy.make(made, "shards")
    job = made.jobs["pretrain"]

    def cancel() -> None:
        while plans.saved_step(job.path) is None:
            time.sleep(0.05)
        with get_client(sync_client=True) as client:
            newest = max(client.read_flow_runs(), key=lambda flow_run: flow_run.created)
            client.set_flow_run_state(newest.id, Cancelling())

    thread = threading.Thread(target=cancel)
    thread.start()
    state = run(toy, *slow)
    thread.join()
    assert state.is_cancelled() and "saved a checkpoint" in (state.message or "")
    assert plans.explain(made)["pretrain"].state == "resume"


def test_damage_done_while_a_run_is_on_its_way_is_repaired_by_it(toy: Toy) -> None:
    undisturbed = toy.plan()
    toy.make(undisturbed)
    weights = (undisturbed.jobs["sft"].path / "model.safetensors").read_bytes()
    for stage in ("pretrain", "mid", "sft"):
        shutil.rmtree(toy.base_dir / stage)
    made = toy.plan("sft.pause=0.3", "sft_eval.questions=11")

    def damage() -> None:
        while not (made.jobs["mid"].path / "result.json").exists():
            time.sleep(0.01)
        path = made.jobs["pretrain"].path / "model.safetensors"  # nothing reads it any more
        data = bytearray(path.read_bytes())
        data[3] ^= 1
        path.write_bytes(data)
        (made.jobs["mid"].path / "model.safetensors").unlink()

    thread = threading.Thread(target=damage)
    thread.start()
    state = run(toy, "sft.pause=0.3", "sft_eval.questions=11")
    thread.join()
    assert state.is_completed()
    assert (made.jobs["sft"].path / "model.safetensors").read_bytes() == weights
    assert {verdict.state for verdict in plans.explain(made).values()} == {"hit"}
    assert toy.starts(made, "pretrain") == ["0", "0", "0"] and toy.starts(made, "sft") == ["0"]
