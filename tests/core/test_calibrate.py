"""What a plan says of hours: measured where it was measured, reckoned where it was not, and which is said."""

import json
from pathlib import Path

import pytest

from nanochat_core.artifacts import store
from nanochat_core.runner import calibrate, estimate, launch
from nanochat_core.runner import plan as plans
from nanochat_core.runner.calibrate import Calibration, Point
from nanochat_core.runner.compare import plan_facts
from nanochat_core.runner.plan import Plan

SPEED = Calibration(
    [Point(4, 900.0, 3.0), Point(8, 1000.0, 5.0), Point(16, 950.0, 9.0)], 2.0, 3000.0, 500.0, "x"
)


def costs(plan: Plan) -> tuple[dict[str, estimate.Forecast], str]:
    return estimate.forecast(plan, plans.explain(plan))


def test_the_fastest_device_batch_that_the_profile_allows_counts() -> None:
    assert SPEED.best().rows == 8
    assert SPEED.best(4).rows == 4
    assert SPEED.best(1).rows == 4  # nothing so small was timed


def test_a_calibration_gives_each_training_stage_its_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plans.load("dgx-spark", base_dir=tmp_path)
    monkeypatch.setattr(estimate, "kept", lambda plan: SPEED)
    found, rate = costs(made)
    facts = made.facts("pretrain")
    looks = 2 + 3320 // 250
    wanted = 5 + facts["tokens"] / 1000 + 3320 * 2.0 + looks * 20 * 2**19 / 3000
    assert found["pretrain"].seconds == pytest.approx(wanted) and not found["pretrain"].about
    assert (
        found["mid"].about and found["mid"].seconds > 850_000 * 500 / 1000
    )  # its rows are known, not their length
    assert found["rl"].about and found["base_eval"].about and found["base_loss"].seconds is not None
    assert rate.startswith("1,000 tokens/s at 8 rows")
    monkeypatch.setattr(estimate, "kept", lambda plan: None)
    assert "an assumed GPU" in costs(made)[1]


def test_what_a_spark_takes_is_what_others_measured(tmp_path: Path) -> None:
    days = {name: costs(plans.load(name, base_dir=tmp_path))[0] for name in ("dgx-spark", "dgx-spark-seed")}
    assert 1.9 < (days["dgx-spark"]["pretrain"].seconds or 0) / 86400 < 2.6
    assert 8.5 < (days["dgx-spark-seed"]["pretrain"].seconds or 0) / 86400 < 10.1
    assert (
        4 < (days["dgx-spark"]["mid"].seconds or 0) / 3600 < 10
    )  # the published midtraining: 809 steps of 2^19


def test_a_machine_of_h100s_is_not_reckoned_as_sparks(tmp_path: Path) -> None:
    found, rate = costs(plans.load("speedrun-8xh100", base_dir=tmp_path))
    assert 2.5 < (found["pretrain"].seconds or 0) / 3600 < 3.6 and "three published runs" in rate


def finished(plan: Plan, seconds: float) -> None:
    """Leave the plan's run as if each stage had taken so long."""
    for name, job in plan.jobs.items():
        job.path.mkdir(parents=True)
        record = launch.describe(plan, name, None)
        store.write_json(job.path / "job.json", record)
        store.commit(
            job.path, plan.runtime.base_dir, plan.facts(name), set(), seconds, record["inputs"], None, {}
        )
    plans.remember(plan)


def test_what_another_profile_took_says_nothing_of_this_one(tmp_path: Path) -> None:
    spark = plans.load("dgx-spark", base_dir=tmp_path)
    fresh = costs(spark)
    finished(plans.load("tiny", base_dir=tmp_path), 3.0)
    assert costs(spark) == fresh


def test_an_evaluation_of_a_larger_model_is_not_taken_to_last_as_long_as_the_last(tmp_path: Path) -> None:
    finished(plans.load("tiny", base_dir=tmp_path), 3.0)
    same = plans.load("tiny", base_dir=tmp_path, rerun=["sft"])
    assert costs(same)[0]["sft_eval"].seconds == 3.0
    deeper, _ = costs(plans.load("tiny", ["pretrain.depth=12"], base_dir=tmp_path))
    assert (deeper["pretrain"].seconds or 0) > 6.0  # by its FLOPs
    assert deeper["sft_eval"].seconds != 3.0 and deeper["sft"].seconds != 3.0


def test_what_a_cpu_took_says_nothing_of_a_gpu(tmp_path: Path) -> None:
    finished(plans.load("tiny", base_dir=tmp_path), 3.0)
    elsewhere = plans.load("tiny", ["runtime.device=cuda", "pretrain.steps=17"], base_dir=tmp_path)
    assert (costs(elsewhere)[0]["pretrain"].seconds or 0) != pytest.approx(3.0 * 17 / 16)


def test_disk_counts_downloads_once_and_the_largest_heap_of_checkpoints(tmp_path: Path) -> None:
    made = plans.load("dgx-spark", base_dir=tmp_path)
    verdicts = plans.explain(made)
    need = estimate.needs(made, verdicts)
    params = made.facts("pretrain")["params"]
    shards = made.facts("shards_head")["download"] + made.facts("shards")["download"]
    assert shards == 81 * 100e6  # 80 and the one for validation, although two rows want the first eight
    weights = 4 * 4 * params  # pretrain, mid, sft, rl
    assert need.disk == pytest.approx(3e9 + shards + weights + 3 * 12 * params + 2e9, rel=0.01)
    assert need.memory == 20 * params
    done = {name: plans.Verdict("hit", "done", seconds=1.0) for name in verdicts}
    assert estimate.needs(made, done) == (0, 0)
    fetched = done | {"pretrain": plans.Verdict("fetch", "in the mirror")}
    assert estimate.needs(made, fetched) == (
        round(4 * params),
        0,
    )  # its weights come, no checkpoints are made


def test_a_gpu_profile_is_not_calibrated_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "has_cuda", lambda runtime: False)
    with pytest.raises(ValueError, match=r"this machine has none.*runtime\.device=cpu"):
        calibrate.calibrate(plans.load("dgx-spark", base_dir=tmp_path), print)
    huge = ["runtime.device=cpu", "pretrain.depth=60"]
    with pytest.raises(ValueError, match="even a slice of this model would take about"):
        calibrate.calibrate(plans.load("dgx-spark", huge, base_dir=tmp_path), print)


def test_a_large_model_is_timed_in_slices_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "has_cuda", lambda runtime: False)
    made = plans.load("dgx-spark", ["runtime.device=cpu"], base_dir=tmp_path)
    assert calibrate.cost(made)[1:] == ((4, 8), [1])
    small = plans.load("cpu-demo", base_dir=tmp_path)
    assert calibrate.cost(small)[1:] == ((4,), [2, 4, 8])
    assert calibrate.device_batches(plans.load("dgx-spark", base_dir=tmp_path)) == [
        4,
        8,
        16,
    ]  # never above its own


@pytest.mark.slow  # loads torch
def test_a_slice_is_drawn_out_to_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def timed(shape: object, *rest: object) -> dict[str, float]:
        layers = shape.n_layer  # type: ignore[attr-defined]
        return {"train 1": 1 + 0.5 * layers, "update": 0.1 * layers, "forward": 1.0 * layers, "decode": 0.5}

    monkeypatch.setattr(calibrate, "_time", timed)
    shape = {"sequence_len": 100, "n_layer": 20, "n_head": 1, "n_kv_head": 1, "n_embd": 32, "vocab_size": 64}
    runtime = {"device": "cpu", "threads": 1}
    found = calibrate.main({"shape": shape, "runtime": runtime, "layers": [4, 8], "rows": [1]})
    assert found["points"][0]["tokens_per_s"] == pytest.approx(100 / 11)
    assert found["update_seconds"] == pytest.approx(2.0) and "4 and 8 of 20 layers" in found["how"]
    noise = {4: 9.0, 8: 3.0}
    monkeypatch.setattr(calibrate, "_time", lambda shape, *rest: {"train 1": noise[shape.n_layer]})
    with pytest.raises(ValueError, match=r"8 layers took less time than 4.*when this machine is quiet"):
        calibrate.main({"shape": shape, "runtime": runtime, "layers": [4, 8], "rows": [1]})


@pytest.mark.slow
def test_the_real_model_is_timed_once_and_kept(tmp_path: Path) -> None:
    made = plans.load("tiny", base_dir=tmp_path)
    assert calibrate.kept(made) is None
    found = calibrate.calibrate(made, print)
    assert [point.rows for point in found.points] == [1, 2, 4] and found.best().tokens_per_s > 100
    assert found.decode_tokens_per_s > 0 and found.how == "2 layers, measured"
    assert calibrate.kept(made) == found
    assert (
        calibrate.kept(plans.load("tiny", ["pretrain.depth=4"], base_dir=tmp_path)) is None
    )  # another model
    assert calibrate.kept(plans.load("tiny", ["runtime.compile=true"], base_dir=tmp_path)) is None
    (path,) = (tmp_path / "calibration").iterdir()
    path.write_text(json.dumps({"points": 3}))
    assert calibrate.kept(made) is None  # what cannot be read is measured again


def test_two_profiles_stand_beside_each_other_with_published_numbers(tmp_path: Path) -> None:
    ours = plan_facts(plans.load("dgx-spark", base_dir=tmp_path))
    seeds = plan_facts(plans.load("dgx-spark-seed", base_dir=tmp_path))
    assert (ours["params"], seeds["params"]) == (896_533_746, 560_988_160)
    assert ours["FLOPs"] / seeds["FLOPs"] == pytest.approx(1 / 3.9, rel=0.02)  # type: ignore[operator]
    assert str(ours["pretraining there"]).startswith("1.9 to 2.6 days")
    assert str(seeds["pretraining there"]).startswith("9.1 to 10.1 days")
    assert seeds["CORE to expect"] == "0.20 to 0.22"
    assert plan_facts(plans.load("tiny", base_dir=tmp_path))["CORE to expect"] is None
