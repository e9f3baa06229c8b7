"""ARC, easy and challenge: lettered multiple choice about science for schools."""

from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, multiple_choice, same_text, view_size
from nanochat_core.data.tasks.tables import table


def _load(name: str, split: Split, size: int | None, assets: Path | None) -> Rows:
    rows = table(name, split, assets)

    def row(index: int) -> Problem:
        found = rows[index]
        labels: list[str] = found["choices"]["label"]  # letters, in a few rows digits
        return multiple_choice(found["question"], found["choices"]["text"], labels.index(found["answerKey"]))

    return Rows(name, view_size(size, rows), row, same_text, kind="categorical", baseline=0.25)


def easy(split: Split, size: int | None, assets: Path | None) -> Rows:
    return _load("arc_easy", split, size, assets)


def challenge(split: Split, size: int | None, assets: Path | None) -> Rows:
    return _load("arc_challenge", split, size, assets)
