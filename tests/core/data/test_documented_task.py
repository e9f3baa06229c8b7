import re
from pathlib import Path

GUIDE = Path(__file__).parents[3] / "docs" / "tasks.md"


def test_the_guides_example_is_a_task() -> None:
    example = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(example, "reversing.py", "exec"), names)
    load = names["load"]
    assert callable(load)
    train, test = load("train", None, None), load("test", None, None)
    questions = [{task[i]["messages"][0]["content"] for i in range(len(task))} for task in (train, test)]
    assert len(questions[1]) > 20 and not questions[0] & questions[1]
    assert train.correct(train[0], train[0]["messages"][1]["content"]) and not train.correct(train[0], "x")
