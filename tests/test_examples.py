"""The examples run as they are, and the code that docs/using-the-library.md shows is theirs."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nanochat_core.runner import plan as plans
from nanochat_core.runner.launch import launch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """An example in this process, on one thread and in an empty directory; gives what it printed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)

    def example(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    yield example
    torch.set_num_threads(before)


def losses(printed: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d\d", printed)]


def test_a_model_trained_on_a_text_is_saved_and_can_be_talked_to(run: Run) -> None:
    printed = run("train_on_text.py")
    (first, last) = losses(re.search("loss .*", printed)[0])  # type: ignore[index]
    assert last < first / 2
    assert "\nThe " in printed and "chat_with_a_run.py my-model" in printed
    assert "> Who are you?\n" in run("chat_with_a_run.py", "my-model", "Who are you?")


def test_a_stage_of_the_latest_run_can_be_talked_to(
    run: Run, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tiny_base))
    assert run("chat_with_a_run.py").startswith("rl: ")
    assert run("chat_with_a_run.py", "sft", "Hello").startswith("sft: ")


def test_each_optimizer_trains_the_model(run: Run) -> None:
    lines = run("change_the_optimizer.py").splitlines()
    assert [line.split()[0] for line in lines] == ["nanochat", "adamw", "lion_for_all"]
    for line in lines:
        curve = losses(line)
        assert curve[-1] < curve[0] / 2, line


def test_a_task_is_learned_for_numbers_that_were_not_trained_on(run: Run) -> None:
    printed = run("add_a_task.py")
    assert "before: 0.00" in printed
    assert losses(re.search("after: .*", printed)[0])[0] > 0.9  # type: ignore[index]


def test_a_stage_of_ones_own_leaves_its_artifact(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    own = f'profile.stages=["{EXAMPLES / "add_a_stage.py"}:longest_tokens"]'
    made = plans.load("tiny", [own, "longest_tokens.count=3"], base_dir=tmp_path / "base")
    launch(made, "longest_tokens")
    job = made.jobs["longest_tokens"]
    assert len((job.path / "longest.txt").read_text().splitlines()) == 3
    assert json.loads((job.path / "result.json").read_text())["metrics"]["characters"] > 3


def test_every_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name


def unindented(text: str) -> str:
    """Documentation shows what stands in a function without its indent."""
    return "\n".join(line.strip() for line in text.splitlines())


def test_code_in_the_documentation_is_taken_from_the_examples() -> None:
    page = (ROOT / "docs" / "using-the-library.md").read_text()
    sources = [unindented(path.read_text()) for path in EXAMPLES.glob("*.py")]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for paragraph in "\n\n".join(map(unindented, blocks)).split("\n\n"):
        assert any(paragraph.strip() in source for source in sources), paragraph
