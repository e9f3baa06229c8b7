"""The worked example of docs/adding-a-stage.md, and a chat with what a stage of one's own has left."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import Command

from nanochat_core.runner import plan as plans
from nanochat_core.runner.estimate import forecast, needs
from nanochat_core.runner.launch import launch

ROOT = Path(__file__).parents[2]
COPY = """
import shutil

from nanochat_core.artifacts.stage import Recipe

ROW = {"reads": {"model": "sft", "tokenizer": "tokenizer"}, "trains": "polish"}


class Config(Recipe):
    pass


def run(cfg, job):
    for name in ("model.safetensors", "config.json"):
        shutil.copy(job.inputs["model"] / name, job.path / name)
    return {}
"""


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("prefect")))


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the document shows."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding-a-stage.md").read_text(), re.S)
    file = tmp_path_factory.mktemp("example") / "my_stage.py"
    file.write_text(blocks[0])
    return file


def test_the_documents_stage_is_planned_with_its_work_and_its_needs(example: Path, tmp_path: Path) -> None:
    made = plans.load("tiny", [f'profile.stages=["{example}:polish"]'], base_dir=tmp_path)
    assert list(made.jobs).index("polish") == list(made.jobs).index("sft") + 1
    assert made.facts("polish")["tokens"] == 4 * 512 and made.sources["report"]["polish"] == "polish"
    verdicts = plans.explain(made)
    costs, _ = forecast(made, verdicts)
    without = plans.load("tiny", base_dir=tmp_path)
    assert (costs["polish"].seconds or 0) > 5 and not costs["polish"].about
    assert needs(made, verdicts).disk > needs(without, plans.explain(without)).disk
    assert all(made.jobs[name].fingerprint == job.fingerprint for name, job in without.jobs.items()
               if name != "report")  # fmt: skip
    with pytest.raises(ValueError, match=r"set polish\.total_batch to 512"):
        plans.load(
            "tiny", [f'profile.stages=["{example}:polish"]', "polish.total_batch=500"], base_dir=tmp_path
        )


def test_what_it_leaves_can_be_chatted_with(base: Path, tmp_path: Path, here: Command) -> None:
    (tmp_path / "copy.py").write_text(COPY)
    made = plans.load("tiny", [f'profile.stages=["{tmp_path}/copy.py:polish"]'], base_dir=base)
    launch(made, "polish")
    plans.remember(made)
    done = here("chat", "polish", "-p", "hi", "--max-tokens", "4", "--base-dir", str(base))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_documents_commands_do_what_it_says(base: Path, example: Path) -> None:
    def nanochat(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "nanochat_core.cli.main", *words, "--base-dir", str(base)],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=example.parent,
            env=os.environ | {"PREFECT_API_URL": "", "PREFECT_HOME": str(base.parent / "prefect")},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    stage = ["--stage", "my_stage.py:polish"]
    assert re.search(r"^polish +run ", nanochat("plan", "tiny", *stage, "--no-calibrate"), re.M)
    said = nanochat("run", "tiny", *stage)
    assert re.search(r"^polish +done", said, re.M) and not re.search(r"^sft +starts", said, re.M)
    assert re.search(r"^polish +done", nanochat("status"), re.M)
    assert "polish | bits per byte" in nanochat("report")
    nanochat("chat", "polish", "-p", "Who are you?", "--max-tokens", "4")
    assert nanochat("run", "tiny", *stage).startswith("talk to it: nanochat chat rl")
