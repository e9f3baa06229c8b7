import re
import tomllib
from pathlib import Path

from nanochat_core.data.tasks import check_name
from nanochat_core.data.tasks.identity import read

GUIDE = Path(__file__).parents[3] / "docs" / "tasks.md"


def test_the_guides_example_is_a_task() -> None:
    example = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(example, "reversing.py", "exec"), names)
    load = names["load"]
    assert callable(load)
    train, test = load("train", None, None), load("test", None, None)
    questions = [{task[i]["messages"][0]["content"] for i in range(len(task))} for task in (train, test)]
    assert len(questions[1]) > 10 and not questions[0] & questions[1]
    assert train.correct(train[0], train[0]["messages"][1]["content"]) and not train.correct(train[0], "x")


def test_the_guides_mixtures_name_tasks_that_are() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    stages = tomllib.loads(example)
    names = [*stages["mid"]["mixture"], *stages["sft"]["mixture"], *stages["sft_eval"]["tasks"]]
    assert [check_name(name) for name in names] == names and len(names) == 5


def test_the_guide_to_an_identity_shows_lines_that_are_read(tmp_path: Path) -> None:
    guide = (GUIDE.parent / "identity.md").read_text(encoding="utf-8")
    lines = [line for line in guide.splitlines() if line.startswith(('[{"role"', '{"messages"'))]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    rows = read(tmp_path / "mine.jsonl")
    assert [row["answer"] for row in rows] == ["nanochat", "Ada"]
