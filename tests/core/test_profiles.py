"""Every profile is read and planned, and what it says of itself is what was published."""

import json
from pathlib import Path

import pytest

from nanochat_core.model.cross_entropy import slice_rows
from nanochat_core.report.published import EXPECTED
from nanochat_core.runner import plan as plans
from nanochat_core.train.config import Training


@pytest.mark.parametrize("profile", plans.profile_names())
def test_every_profile_can_be_planned(profile: str, tmp_path: Path) -> None:
    plan = plans.load(profile, base_dir=tmp_path)
    assert all(verdict.state == "run" for verdict in plans.explain(plan).values())
    assert plan.facts("pretrain")["tokens"] > 0
    assert {"pretrain", "sft", "report"} <= set(plan.jobs)


@pytest.mark.parametrize(
    ("profile", "params", "steps", "tokens", "flops"),
    [
        ("dgx-spark-seed", 560_988_160, 21_400, 11.22e9, 3.92e19),
        ("speedrun-8xh100", 560_988_160, 21_400, 11.22e9, 3.92e19),
        ("run1000", 1_879_048_192, 71_680, 37.58e9, 4.54e20),
        ("dgx-spark", 896_533_746, 3_320, 3.48e9, 1.00e19),
        ("dgx-spark-x2", 896_533_746, 3_320, 3.48e9, 1.00e19),
    ],
)
def test_a_profile_costs_what_was_published(
    profile: str, params: int, steps: int, tokens: float, flops: float, tmp_path: Path
) -> None:
    facts = plans.load(profile, base_dir=tmp_path).facts("pretrain")
    assert (facts["params"], facts["steps"]) == (params, steps)
    assert facts["tokens"] == pytest.approx(tokens, rel=2e-3)
    assert facts["flops"] == pytest.approx(flops, rel=5e-3)


@pytest.mark.parametrize("profile", ["dgx-spark-seed", "speedrun-8xh100", "run1000"])
def test_what_was_of_november_2025_is_as_it_was(profile: str, tmp_path: Path) -> None:
    jobs = plans.load(profile, base_dir=tmp_path).jobs
    pretrain, mid, sft = (jobs[row].config for row in ("pretrain", "mid", "sft"))
    for config in (pretrain, mid, sft, *([jobs["rl"].config] if "rl" in jobs else [])):
        assert not config.scale_rates and config.warmup_steps == 0 and config.final_lr == 0
        assert (config.matrix_lr, config.embedding_lr, config.unembedding_lr) == (0.02, 0.2, 0.004)
        assert config.weight_decay == 0

    def momentum(config: Training, steps: int) -> list[float]:
        return [config.schedule().muon_momentum(step, steps) for step in (0, 150, 300, steps)]

    assert momentum(pretrain, 20_000) == momentum(mid, 809) == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert momentum(sft, 701) == [0.95] * 4
    for config in (pretrain, mid):
        assert [config.schedule().lr(step, 800) for step in (0, 640, 720)] == pytest.approx([1, 1, 0.5])
    assert (mid.total_batch, mid.lr_fraction, mid.grad_clip, pretrain.grad_clip) == (2**19, 1, None, 1)
    assert (sft.total_batch, sft.steps, sft.lr_fraction) == (8 * 2048, 701, 0.02)
    assert [sft.schedule().lr(step, 701) for step in (0, 350)] == pytest.approx([1, 0.5], abs=1e-3)
    # What comes to a step: 32 conversations of the mixture's mean length, as the profile reckons it.
    shares = sft.mixture
    tokens = 820 * shares["smoltalk"] + 180 * (sum(shares.values()) - shares["smoltalk"])
    assert sft.total_batch / (tokens / sum(shares.values())) == pytest.approx(32, abs=3)
    if "rl" in jobs:
        rl = jobs["rl"].config
        assert momentum(rl, 467) == [0.95] * 4
        assert (rl.steps, rl.questions, rl.samples, rl.lr_fraction) == (467, 16, 16, 0.05)


def test_scaling_rules_give_the_published_batches_and_decay(tmp_path: Path) -> None:
    for depth, batch, decay in ((8, 2**18, 0.5), (12, 2**19, 0.28), (20, 2**20, 0.10), (24, 2**20, 0.060)):
        settings = [f"pretrain.depth={depth}", "pretrain.tokens_per_param=12"]
        config = plans.load("dgx-spark", settings, base_dir=tmp_path).jobs["pretrain"].config
        assert config.batch(32_768) == batch
        assert config.weight_decay * config.decay_scale(32_768) == pytest.approx(decay, abs=0.003)


def test_decay_is_bounded_below_the_depths_the_rule_was_fitted_on(tmp_path: Path) -> None:
    config = plans.load("dgx-spark", ["pretrain.depth=4"], base_dir=tmp_path).jobs["pretrain"].config
    assert config.weight_decay * config.decay_scale(32_768) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["pretrain.total_batch=2000"], r"set pretrain\.total_batch to 2048"),
        (["sft.total_batch=1000"], r"set sft\.total_batch to 1024"),
        (["runtime.nproc=3"], r"not a multiple of 3 x 256; set pretrain\.total_batch to 2304"),
        (
            ["runtime.nproc=128", *(f"{row}.total_batch=32768" for row in ("pretrain", "mid", "sft"))],
            r"128 ranks cannot share \d+ questions; raise rl\.questions",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_anything_runs(
    settings: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        plans.load("cpu-demo", settings, base_dir=tmp_path)


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("dgx-spark", "897 M|3.48 G|1.00e19"),
        ("dgx-spark-seed", "561 M|11.2 G|3.92e19"),
        ("speedrun-8xh100", "561 M|11.2 G|3.92e19"),
        ("run1000", "1.88 G|37.6 G|4.54e20"),
    ],
)
def test_the_plan_prints_the_published_parameters_tokens_and_flops(
    profile: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from nanochat_core.cli.plan_verb import plan

    plan(profile, base_dir=tmp_path, calibrate=False)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pretrain ")]
    assert "|".join(word.strip() for word in row.split("  ") if word.strip()).startswith(
        f"pretrain|run|{said}|"
    )


@pytest.mark.parametrize(
    "profile", [name for name in plans.profile_names() if name not in ("tiny", "cpu-demo")]
)
def test_what_runs_for_days_is_examined_first_and_says_what_to_expect(profile: str, tmp_path: Path) -> None:
    plan = plans.load(profile, base_dir=tmp_path)
    assert plan.runtime.preflight
    low, high = EXPECTED[profile].rates
    assert 0 < low < high and EXPECTED[profile].core


def test_the_large_gpus_hours_are_the_published_ones(tmp_path: Path) -> None:
    def hours(profile: str, rate: float) -> float:
        plan = plans.load(profile, base_dir=tmp_path)
        return plan.facts("pretrain")["flops"] / rate / plan.runtime.processes / 3600

    for profile, low, high in (("speedrun-8xh100", 2.86, 3.16), ("run1000", 31.0, 33.0)):
        slow, fast = EXPECTED[profile].rates
        assert low * 0.97 < hours(profile, fast) < hours(profile, slow) < high * 1.03


@pytest.mark.parametrize("profile", plans.profile_names())
def test_a_loss_is_made_in_few_slices_on_a_gpu(profile: str, tmp_path: Path) -> None:
    """Each slice moves the whole gradient of the head, and the compiler unrolls them all."""
    plan = plans.load(profile, base_dir=tmp_path)
    V = plan.jobs["tokenizer"].config.vocab_size
    T = plan.jobs["pretrain"].config.sequence_len
    batches = {row: plan.jobs[row].config.total_batch for row in ("mid", "sft")}
    batches["pretrain"] = plan.jobs["pretrain"].config.batch(V)
    for row, batch in batches.items():
        whole = batch // plan.runtime.processes
        N = min(whole, plan.runtime.device_batch.get(row, 0) * T or whole)
        n = slice_rows(N, V, "cuda")
        assert -(-N // n) <= 16
        assert n * V <= 2**28  # 1 GB of fp32
        assert slice_rows(N, V, "cpu") == 2**22 // V  # 16 MB


def test_a_huge_batch_grows_the_slices_instead_of_their_number() -> None:
    assert slice_rows(2**20, 65_536, "cuda") == 2**20 // 16


def test_each_stage_of_each_profile_has_the_identity_it_always_had(tmp_path: Path) -> None:
    """A changed one orphans what people have trained; one that is meant has its row's version raised."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "fingerprints.json").read_text())
    found = {
        profile: {name: job.fingerprint for name, job in plans.load(profile, base_dir=tmp_path).jobs.items()}
        for profile in golden
    }
    assert found == golden and set(golden) == set(plans.profile_names())
