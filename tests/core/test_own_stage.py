"""Stages out of a user's own file: planned, run, cached, reported and found, with no edit in the package."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import PROFILE, TOY, Toy

from nanochat_core import report
from nanochat_core.runner import gc, launch, status
from nanochat_core.runner import plan as plans
from nanochat_core.runner.compare import find_run
from nanochat_core.runner.table import load_table

POLISH = """
from nanochat_core.artifacts.stage import Job, Metrics, Recipe
from nanochat_core.artifacts.store import write_whole

ROW = {"reads": {"model": "sft"}, "trains": "polish"}


class Config(Recipe):
    shine: int = 1


def run(cfg: Config, job: Job[Config]) -> Metrics:
    weights = (job.inputs["model"] / "model.safetensors").read_text()
    write_whole(job.path / "model.safetensors", weights * cfg.shine)
    return {"val_bpb_start": 1.5, "val_bpb": 1.25, "steps": cfg.shine}
"""
EVAL = """
from nanochat_core.artifacts.stage import Recipe

ROW = {"reads": {"model": "polish"}, "measures": "polish"}


class Config(Recipe):
    pass


def run(cfg, job):
    return {"chatcore": 0.75, "spelling": 0.875}
"""
TABLE = str(TOY / "table.py")


@pytest.fixture
def polish(tmp_path: Path) -> Path:
    file = tmp_path / "my_stage.py"
    file.write_text(POLISH)
    return file


@pytest.fixture
def profile(tmp_path: Path, polish: Path) -> Path:
    """A profile beside the stage's file, which it names as the two lie."""
    (tmp_path / "my_eval.py").write_text(EVAL)
    file = tmp_path / "mine.toml"
    own = ["my_stage.py:polish", "my_eval.py:polish_eval"]
    file.write_text(f'[profile]\nstages = ["{TABLE}", "{own[0]}", "{own[1]}"]\n[polish]\nshine = 2\n')
    return file


@pytest.fixture
def mine(toy: Toy, profile: Path) -> Callable[..., plans.Plan]:
    return lambda *overrides, **more: plans.load(str(profile), overrides, base_dir=toy.base_dir, **more)


def test_a_stage_of_ones_own_stands_right_behind_what_it_reads(mine: Callable[..., plans.Plan]) -> None:
    rows = ["shards", "pretrain", "base_loss", "mid", "sft", "polish", "polish_eval", "sft_eval", "report"]
    assert list(mine().jobs) == rows
    assert list(mine(until="polish").jobs) == rows[:6]
    assert mine().jobs["polish"].config.shine == 2 and mine("polish.shine=3").jobs["polish"].config.shine == 3


def test_it_runs_is_cached_and_is_found_wherever_a_built_in_one_is(
    toy: Toy, mine: Callable[..., plans.Plan], profile: Path
) -> None:
    made = mine()
    toy.make(mine(until="sft"))
    assert launch.launch(made, "polish")["val_bpb"] == 1.25  # in a process of its own
    toy.make(made)
    assert toy.run(mine()) == []
    polish = made.jobs["polish"]
    latest = plans.latest_run(toy.base_dir) or {}
    found = {s.stage: s.state for s in status.standings(toy.base_dir, latest)}
    assert found["polish"] == found["polish_eval"] == "done"
    assert status.find_model(toy.base_dir, "polish") == status.find_model(toy.base_dir, None) == polish.path
    assert "- polish\n" in (made.jobs["report"].path / "report.md").read_text()
    metrics = find_run(toy.base_dir, str(profile)).metrics
    assert (metrics["polish/val_bpb"], metrics["polish/chatcore"]) == (1.25, 0.75)
    assert "polish/steps" not in metrics
    inputs = {name: job.path for name, job in made.jobs.items() if name != "report"}
    page = report.to_markdown(report.collect(inputs, made.table))
    assert "| polish | bits per byte | 1.5000 | 1.2500 | -0.2500 |" in page
    assert (
        re.search(r"\| polish \| ChatCORE \| +\| 0\.7500 \|", page)
        and "| task | SFT | POLISH | gain |" in page
    )
    assert list(gc.unused(toy.base_dir, 0)) == []
    toy.make(mine("polish.shine=3"))
    assert [one.directory for one in gc.unused(toy.base_dir, 0)][:1] == [polish.path]


def test_a_changed_file_is_another_stage(toy: Toy, mine: Callable[..., plans.Plan], polish: Path) -> None:
    before = mine()
    toy.make(before)
    polish.write_text(POLISH.replace("1.25", "1.125"))
    verdicts = plans.explain(mine())
    assert verdicts["polish"].why == f"{polish} has changed"
    assert verdicts["polish_eval"].why == "its input polish is another"
    assert {verdicts[row].state for row in ("sft", "sft_eval")} == {"hit"}
    (before.jobs["polish"].path / "result.json").unlink()
    with pytest.raises(launch.StageFailed, match=r"my_stage\.py has changed since polish was planned"):
        launch.launch(before, "polish")


def test_overrides_add_stages_by_their_paths(toy: Toy, polish: Path) -> None:
    made = toy.plan(f'profile.stages=["{polish}:polish"]')
    assert "polish" in made.jobs and made.jobs["sft"].fingerprint == toy.plan().jobs["sft"].fingerprint
    assert made.stages == (TABLE, f"{polish}:polish")
    with pytest.raises(plans.UsageError, match=r"profile\.stages = 's\.py:x': write a list"):
        toy.plan("profile.stages=s.py:x")
    with pytest.raises(
        plans.UsageError, match="no key of profile to set called 'stage'; did you mean stages"
    ):
        toy.plan('profile.stage=["s.py:x"]')


def test_an_optional_row_is_there_for_whoever_switches_it_on(toy: Toy) -> None:
    assert "draft_eval" not in toy.plan().table
    made = toy.plan('profile.stages=["draft_eval"]')
    assert list(made.sources["draft_eval"].values()) == ["mid"]
    assert made.sources["report"]["draft_eval"] == "draft_eval"


@pytest.mark.parametrize(
    ("source", "text", "says"),
    [
        ("none.py:polish", None, r"none\.py cannot be read: No such file"),
        ("s.py:polish", "x = 1", r"s\.py has no Config; a stage's file has Config, run and ROW"),
        ("s.py:polish", "x =", r"s\.py cannot be loaded: SyntaxError"),
        ("s.py:polish", POLISH.replace("reads", "raeds"), r"s\.py, ROW: .*'raeds'"),
        ("s.py:polish", POLISH.replace('"sft"', '"stf"'), "no stage called 'stf'; did you mean sft"),
        ("s.py:sft", POLISH, "there is a stage called sft already"),
        ("s.py:my stage", POLISH, "cannot be a stage's name"),
        ("s.py:runtime", POLISH, "cannot be a stage's name"),
        ("draft", None, "no optional stage called 'draft'; did you mean draft_eval"),
    ],
)
def test_what_is_wrong_with_a_stages_file_is_said(
    tmp_path: Path, source: str, text: str | None, says: str
) -> None:
    if text is not None:
        (tmp_path / "s.py").write_text(text)
    place = source if source == "draft" else f"{tmp_path}/{source}"
    with pytest.raises(plans.UsageError, match=says):
        load_table([TABLE, place])


def test_a_table_needs_its_rows(tmp_path: Path, polish: Path) -> None:
    with pytest.raises(
        plans.UsageError, match=r"has no STAGES; to add one stage of it, write my_stage\.py:NAME"
    ):
        load_table([str(polish)])
    assert str(PROFILE.with_name("table.py")) == TABLE
