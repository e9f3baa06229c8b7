"""A task whose rows will not be there is refused by the plan, with what to set; not days later by a stage."""

import json
from pathlib import Path

import pytest

from nanochat_core.runner import plan as plans

HUB = ["arc_easy", "arc_challenge", "mmlu", "gsm8k", "humaneval", "smoltalk"]


@pytest.mark.parametrize(
    ("profile", "settings", "says"),
    [
        ("tiny", ["rl.task=gsm8k"], r"rl\.task needs gsm8k, .*set assets\.source to hub"),
        ("tiny", ["sft.mixture.gsm8k=100"], r"sft\.mixture needs gsm8k, which is not among the embedded"),
        ("tiny", ['sft.mixture={ "smoltalk[:9]" = 9 }'], r"sft\.mixture needs smoltalk"),
        ("tiny", ["mid.mixture.humaneval=5"], r"mid\.mixture needs train rows of humaneval, which has test"),
        ("tiny", ['sft_eval.tasks=["capitals", "mmlu"]'], r"sft_eval\.tasks needs mmlu"),
        (
            "tiny",
            ['sft.mixture={ "custom_json:/gone.jsonl" = 9 }'],
            r"sft\.mixture names /gone\.jsonl, which",
        ),
        ("tiny", ["rl.task=custom_json:/gone.jsonl"], r"rl\.task names /gone\.jsonl, which is not there"),
        ("tiny", ['assets.tasks=["nonsense"]'], "'nonsense' is not a data set to bring; those are arc_easy"),
        (
            "dgx-spark",
            ['assets.tasks=["gsm8k"]'],
            r'mid\.mixture needs smoltalk and mmlu, .*set assets\.tasks to \["gsm8k", "smoltalk", "mmlu"\]',
        ),
        (
            "dgx-spark",
            [f"assets.tasks={json.dumps([name for name in HUB if name != 'humaneval'])}"],
            r"mid_eval\.tasks needs humaneval, which the assets leave out",
        ),
        ("dgx-spark", ["rl.task=humaneval"], r"rl\.task needs train rows of humaneval"),
        ("speedrun-8xh100", ["assets.source=embedded"], r"mid\.mixture needs smoltalk"),
    ],
)
def test_a_task_without_its_rows_is_refused_before_anything_runs(
    profile: str, settings: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=says):
        plans.load(profile, settings, base_dir=tmp_path)


def test_rows_of_a_folder_of_ones_own_will_do(tmp_path: Path) -> None:
    asked = ["rl.task=gsm8k", f"assets.task_folder={tmp_path}", 'assets.tasks=["gsm8k"]']
    with pytest.raises(ValueError, match=r"rl\.task needs gsm8k: neither .*gsm8k/train\.parquet nor \.jsonl"):
        plans.load("tiny", asked, base_dir=tmp_path)
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").touch()  # validation is taken from it
    assert "rl" in plans.load("tiny", asked, base_dir=tmp_path).jobs


def test_what_is_set_to_0_and_what_is_generated_needs_nothing(tmp_path: Path) -> None:
    settings = ["sft.mixture.gsm8k=0", "sft.mixture.choices=20", "rl.task=counting"]
    assert "sft" in plans.load("tiny", settings, base_dir=tmp_path).jobs


def test_a_finished_stage_misses_no_file_that_has_gone_since(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.touch()
    settings = [f'sft.mixture={{ "custom_json:{path}" = 9 }}']
    job = plans.load("tiny", settings, base_dir=tmp_path).jobs["sft"]
    path.unlink()
    with pytest.raises(ValueError, match="which is not there"):
        plans.load("tiny", settings, base_dir=tmp_path)
    job.path.mkdir(parents=True)
    (job.path / "result.json").write_text("{}")
    assert "sft" in plans.load("tiny", settings, base_dir=tmp_path).jobs


def test_a_file_of_ones_own_is_looked_for_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.touch()
    settings = [f'sft.mixture={{ "custom_json:{path}" = 9, "custom_json:{path}[:3]" = 9 }}']
    assert "sft" in plans.load("tiny", settings, base_dir=tmp_path).jobs
