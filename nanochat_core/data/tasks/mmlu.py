"""MMLU: four lettered choices in 57 subjects; train is the auxiliary set, made of other benchmarks."""

from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, multiple_choice, same_text, view_size
from nanochat_core.data.tasks.tables import table


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    rows = table("mmlu", split, assets)

    def row(index: int) -> Problem:
        found = rows[index]
        return multiple_choice(found["question"], found["choices"], found["answer"])

    return Rows("mmlu", view_size(size, rows), row, same_text, kind="categorical", baseline=0.25)
