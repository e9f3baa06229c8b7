"""Damage to what a stage reads: found by hashes before it is used, taken back, made again."""

import shutil
import threading
from pathlib import Path

import pytest
from toys import Toy

from nanochat_core.artifacts import store
from nanochat_core.runner import inputs, launch
from nanochat_core.runner import plan as plans


def flip(path: Path) -> None:
    """One bit, as a disk that rots does it: same size, same time."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_in_an_input_is_found_before_it_is_read(toy: Toy) -> None:
    made = toy.plan(until="pretrain")
    toy.make(made)
    flip(made.jobs["pretrain"].path / "model.safetensors")
    later = toy.plan()
    with pytest.raises(launch.InputLost, match=r"mid reads pretrain, which is damaged: model\.safetensors"):
        launch.launch(later, "mid")
    assert plans.explain(later)["pretrain"].state == "run"  # its result was taken back
    assert "damaged" in [event["event"] for event in store.read_attempts(made.jobs["pretrain"].path)]
    toy.run(later)
    assert (later.jobs["mid"].path / "result.json").exists()


def test_a_flipped_bit_in_a_shared_file_is_found_too(toy: Toy) -> None:
    made = toy.plan(until="shards")
    toy.make(made)
    flip(toy.base_dir / "downloads" / "words.txt")
    with pytest.raises(launch.InputLost, match=r"words\.txt has changed"):
        launch.launch(toy.plan(), "pretrain")


def test_a_number_that_changed_in_a_result_is_found(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    record = made.jobs["pretrain"].path / "result.json"
    record.write_text(record.read_text().replace("1.5", "1.4"))
    assert plans.explain(made)["pretrain"].state == "hit"  # by its size and shape it is a result
    assert inputs.audit(made) == {"pretrain": "result.json has changed (its seal is another)"}
    assert plans.explain(made)["pretrain"].state == "run"
    assert toy.run(made) == ["pretrain"]  # it came out the same, so nothing follows
    assert inputs.audit(made) == {}


def test_what_is_deleted_while_a_stage_reads_it_is_what_the_stage_names(toy: Toy) -> None:
    made = toy.plan()
    toy.make(toy.plan(until="pretrain"))
    shutil.rmtree(made.jobs["pretrain"].path)
    with pytest.raises(launch.InputLost, match="mid reads pretrain, which is not finished"):
        launch.launch(made, "mid")
    assert inputs.lost(made, "mid") == "pretrain"


def test_the_orchestrators_password_does_not_reach_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:secret")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", "postgresql://me:secret@there/db")
    assert "secret" not in str(launch.environment())


def test_an_attempt_that_was_told_of_other_inputs_does_not_undo_a_result(toy: Toy) -> None:
    made = toy.plan(until="mid")
    toy.make(made)
    job = made.jobs["mid"].path / "job.json"
    record = launch.describe(made, "mid", None)
    record["inputs"]["model"]["content"] = "what pretrain held before it was made again"
    store.write_json(job, record)
    with pytest.raises(inputs.Lost, match="mid reads pretrain, which has been made again meanwhile"):
        launch.execute(job)
    assert plans.explain(made)["mid"].state == "hit"


def test_two_runs_at_once_make_a_stage_once_each_under_its_own_name(toy: Toy) -> None:
    made = toy.plan("pretrain.steps=30", "pretrain.pause=0.02", until="pretrain")
    toy.make(toy.plan(until="shards"))
    threads = [
        threading.Thread(target=launch.launch, args=(made, "pretrain"), kwargs={"rerun": name})
        for name in ("one run", "another run")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    attempts = store.read_attempts(made.jobs["pretrain"].path)
    assert [event["event"] for event in attempts] == ["started", "finished"]
