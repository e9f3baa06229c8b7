"""Tasks made into one sequence of rows, mixed or in turn: the recipe alone decides which row comes when."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_core.data.tasks import load_task
from nanochat_core.data.tasks.base import Problem, Split, Task

Order = Literal["mixed", "in_turn"]


@dataclass(frozen=True)
class Mixture:
    """An order of (task, row) pairs. A task that is asked for more rows than it has begins again."""

    tasks: tuple[Task, ...]
    order: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Problem:
        task, row = self.order[index]
        return self.tasks[task][row]

    def __iter__(self) -> Iterator[Problem]:
        return (self[index] for index in range(len(self)))

    def name(self, index: int) -> str:
        """The task that a row comes from."""
        return self.tasks[self.order[index][0]].name


def mix(tasks: Sequence[tuple[Task, int]], seed: int = 42, order: Order = "mixed") -> Mixture:
    """Take so many rows of each task, again where it has fewer; shuffle them, or leave task after task."""
    for task, count in tasks:
        if count and not len(task):
            raise ValueError(f"the task {task.name} has no rows to mix")
    rows = [(i, row % len(task)) for i, (task, count) in enumerate(tasks) for row in range(count)]
    if order == "mixed":
        random.Random(f"mixture-{seed}").shuffle(rows)
    return Mixture(tuple(task for task, _ in tasks), tuple(rows))


def load_mixture(
    rows: Mapping[str, int],
    split: Split = "train",
    *,
    assets: Path | None = None,
    seed: int = 42,
    order: Order = "mixed",
) -> Mixture:
    """Load each named task with so many rows and put them in order."""
    if not rows or not any(rows.values()):
        raise ValueError("a mixture needs at least one task with rows: mixture = { capitals = 1000, ... }")
    loaded = [(load_task(name, split, size=count, assets=assets), count) for name, count in rows.items()]
    return mix(loaded, seed, order)
