import json
import os
import shutil
from pathlib import Path

import pytest
from toys import PROFILE, TOY, Toy

from nanochat_core.artifacts import store
from nanochat_core.runner import plan
from nanochat_core.runner.plan import UsageError, explain


def states(toy: Toy, *overrides: str, **options: object) -> dict[str, str]:
    return {name: verdict.state for name, verdict in explain(toy.plan(*overrides, **options)).items()}


def reasons(toy: Toy, *overrides: str, **options: object) -> dict[str, str]:
    found = explain(toy.plan(*overrides, **options))
    return {name: verdict.why for name, verdict in found.items() if verdict.state != "hit"}


def test_a_fresh_directory_runs_everything(toy: Toy) -> None:
    assert set(states(toy).values()) == {"run"}
    assert set(reasons(toy).values()) == {"first run"}
    assert not toy.base_dir.exists()  # a plan leaves nothing behind


def test_a_finished_run_runs_nothing(toy: Toy) -> None:
    toy.make(toy.plan())
    assert set(states(toy).values()) == {"hit"}


def test_changing_depth_reruns_only_what_follows(toy: Toy) -> None:
    toy.make(toy.plan())
    assert reasons(toy, "mid.depth=3") == {
        "mid": "mid.depth: 2 -> 3",
        "sft": "its input mid is another",
        "sft_eval": "its input sft is another",
        "report": "its inputs mid, sft, sft_eval are others",
    }


def test_where_it_runs_changes_nothing(toy: Toy) -> None:
    toy.make(toy.plan())
    assert set(states(toy, "runtime.threads=2", "runtime.save_minutes=1").values()) == {"hit"}


def test_asking_again_includes_what_follows_and_nothing_before(toy: Toy) -> None:
    toy.make(toy.plan())
    assert reasons(toy, rerun=["sft"]) == dict.fromkeys(["sft", "sft_eval", "report"], "asked to run again")


def test_until_stops_there_and_says_so(toy: Toy) -> None:
    made = toy.plan(until="mid")
    assert list(made.jobs) == ["shards", "pretrain", "base_loss", "mid"]
    assert made.left_out == dict.fromkeys(["sft", "sft_eval", "report"], "after mid")


def test_until_does_not_change_the_identity_of_what_comes_before(toy: Toy) -> None:
    whole, part = toy.plan(), toy.plan(until="mid")
    assert all(job.fingerprint == whole.jobs[name].fingerprint for name, job in part.jobs.items())


def test_a_deleted_artefact_reruns_that_stage_only(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    shutil.rmtree(made.jobs["mid"].path)
    assert reasons(toy) == {"mid": "its artefact is not there"}
    assert toy.run(made) == ["mid"]


def test_a_truncated_artefact_reruns_that_stage_only(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    os.truncate(made.jobs["pretrain"].path / "model.safetensors", 1)
    assert reasons(toy) == {"pretrain": "model.safetensors has 1 bytes, not 64"}
    assert toy.run(made) == ["pretrain"]


def test_an_input_made_again_with_another_content_is_noticed(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    record = made.jobs["mid"].path / "result.json"
    result = json.loads(record.read_text())
    result["files"]["model.safetensors"]["sha256"] = "0" * 64
    record.write_text(json.dumps(result))
    assert reasons(toy) == {
        "sft": "mid was made again and differs",
        "report": "mid was made again and differs",
    }


def test_an_interrupted_stage_is_resumed_at_its_step(toy: Toy) -> None:
    job = toy.plan().jobs["pretrain"]
    (job.path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (job.path / "checkpoints" / "step_00000002").mkdir()
    verdict = explain(toy.plan())["pretrain"]
    assert (verdict.state, verdict.step) == ("resume", 3)


def test_a_newer_artefact_stops_the_plan(toy: Toy) -> None:
    made = toy.plan(until="shards")
    toy.make(made)
    record = made.jobs["shards"].path / "result.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 99}))
    with pytest.raises(store.Newer):
        explain(made)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("pretrain.deth=3", "no key of pretrain called 'deth'; did you mean depth"),
        ("pretran.depth=3", "no stage called 'pretran'; did you mean pretrain"),
        ("runtime.thread=3", "no key of runtime called 'thread'; did you mean threads"),
        ("pretrain.depth=deep", "pretrain.depth = 'deep': Input should be a valid integer"),
        ("pretrain.depth=1.5", "pretrain.depth = 1.5"),
        ("runtime.nproc=0", "runtime.nproc = 0: Input should be greater than or equal to 1"),
        ("depth=3", "write it as stage.key=value"),
        ("pretrain.depth", "write it as stage.key=value"),
        ("pretrain.=3", "write it as stage.key=value"),
        ("shards.words.x=3", "words is a value, not a table"),
        ("pretrain.depth=100", "pretrain.depth 100 does not fit"),
    ],
)
def test_a_wrong_override_says_what_would_be_right(toy: Toy, override: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        toy.plan(override)
    assert says in str(error.value)


def test_a_value_with_an_equals_sign_is_kept_whole() -> None:
    data: dict[str, object] = {}
    plan._apply(data, "shards.source=https://example.org/a?b=c")
    assert data == {"shards": {"source": "https://example.org/a?b=c"}}


def test_unknown_names_are_met_with_the_known_ones(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no stage called 'stf'; did you mean sft"):
        toy.plan(rerun=["stf"])
    with pytest.raises(UsageError, match="no stage called 'x'"):
        toy.plan(until="x")
    with pytest.raises(UsageError, match="no profile called 'nope'"):
        plan.load("nope", base_dir=tmp_path)
    with pytest.raises(UsageError, match="no profile file"):
        plan.load("nope.toml", base_dir=tmp_path)
    with pytest.raises(UsageError, match="cannot be run again: after mid"):
        toy.plan(until="mid", rerun=["sft"])


def test_a_damaged_profile_is_named(tmp_path: Path, toy: Toy) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text("[pretrain\n")
    with pytest.raises(UsageError, match=r"mine\.toml cannot be read"):
        plan.load(str(profile), base_dir=tmp_path)


def test_a_profile_can_leave_rows_out(tmp_path: Path, toy: Toy) -> None:
    profile = tmp_path / "mine.toml"
    profile.write_text(f'[profile]\nleave_out = ["mid"]\nstages = ["{TOY}/table.py"]\n')
    made = plan.load(str(profile), base_dir=tmp_path)
    assert list(made.jobs) == ["shards", "pretrain", "base_loss", "report"]
    assert made.left_out["sft"] == "it reads mid, which is left out"


def test_finished_work_that_would_go_unused_is_reckoned(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    record = made.jobs["pretrain"].path / "result.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"seconds": 7200.0}))
    other = toy.plan("pretrain.depth=3")
    lost = plan.wasted(other, explain(other))
    assert lost["pretrain"] == 7200.0 and "shards" not in lost
    again = toy.plan(rerun=["pretrain"])
    assert plan.wasted(again, explain(again))["pretrain"] == 7200.0
    assert plan.wasted(made, explain(made)) == {}


def test_a_short_run_does_not_hide_the_longer_ones_models(toy: Toy) -> None:
    made = toy.plan()
    toy.make(made)
    plan.remember(toy.plan(until="pretrain"))
    latest = plan.latest_run(toy.base_dir)
    assert latest is not None and latest["sft"] == made.jobs["sft"].fingerprint
    assert plan.latest_profile(toy.base_dir) == str(PROFILE)


def test_one_stage_needs_only_what_is_missing_of_what_it_reads(toy: Toy) -> None:
    made = toy.plan()
    assert plan.needed(made, "mid", explain(made)) == ["shards", "pretrain", "mid"]
    toy.make(toy.plan(until="mid"))
    assert plan.needed(made, "sft_eval", explain(made)) == ["sft", "sft_eval"]
    shutil.rmtree(made.jobs["pretrain"].path)
    assert plan.needed(made, "mid", explain(made)) == []


def test_artefacts_of_other_code_are_named_and_kept(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    made = toy.plan()
    toy.make(made)
    verdicts = plan.explain(made)
    assert plan.by_other_code(made, verdicts) == []
    monkeypatch.setattr(store, "code_digest", lambda: "another")
    assert plan.by_other_code(made, verdicts) == list(made.jobs)
    assert all(verdict.state == "hit" for verdict in plan.explain(made).values())
