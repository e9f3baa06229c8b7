"""HumanEval: write a Python function from its signature and docstring; right if its tests pass."""

from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, dialogue, spoken, view_size
from nanochat_core.data.tasks.programs import complete
from nanochat_core.data.tasks.tables import table
from nanochat_core.infer.sandbox import run_program

SECONDS = 6.0  # for a program and its tests
MEMORY_MB = 1024  # some need 200 beside the interpreter


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    rows = table("humaneval", split, assets)

    def row(index: int) -> Problem:
        found = rows[index]
        problem = dialogue(found["prompt"], f"```python\n{found['prompt']}{found['canonical_solution']}\n```")
        problem["tests"] = found["test"]
        problem["entry_point"] = found["entry_point"]
        return problem

    return Rows("humaneval", view_size(size, rows), row, tests_pass)


def tests_pass(conversation: Problem, answer: str) -> bool:
    return run_program(program(conversation, answer), seconds=SECONDS, memory_mb=MEMORY_MB).error is None


def check_sandbox() -> None:
    """Programs must be able to run here; if not, better to know before any training."""
    run_program("", seconds=SECONDS, memory_mb=MEMORY_MB)


def program(conversation: Problem, answer: str) -> str:
    """The answer's program and the tests."""
    prompt = conversation["messages"][0]["content"]
    assert isinstance(prompt, str)
    entry_point = conversation["entry_point"]
    code = complete(prompt, entry_point, spoken(answer))
    return f"{code}\n{conversation['tests']}\ncheck({entry_point})"
