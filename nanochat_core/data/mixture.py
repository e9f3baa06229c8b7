"""Tasks mixed into one sequence of rows: which row comes when depends on the mixture and the seed alone."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat_core.data.tasks import load_task
from nanochat_core.data.tasks.base import Problem, Split, Task


@dataclass(frozen=True)
class Mixture:
    """A deterministic order of (task, row) pairs. A task asked for more rows than it has gives them again."""

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


def mix(tasks: Sequence[tuple[Task, int]], seed: int = 42) -> Mixture:
    """Mix so many rows of each task, oversampling those that have fewer."""
    for task, count in tasks:
        if count and not len(task):
            raise ValueError(f"the task {task.name} has no rows to mix")
    order = [(i, row % len(task)) for i, (task, count) in enumerate(tasks) for row in range(count)]
    random.Random(f"mixture-{seed}").shuffle(order)
    return Mixture(tuple(task for task, _ in tasks), tuple(order))


def load_mixture(
    rows: Mapping[str, int], split: Split = "train", *, assets: Path | None = None, seed: int = 42
) -> Mixture:
    """Load each named task with so many rows and mix them."""
    if not rows or not any(rows.values()):
        raise ValueError("a mixture needs at least one task with rows: mixture = { capitals = 1000, ... }")
    return mix([(load_task(n, split, size=count, assets=assets), count) for n, count in rows.items()], seed)
