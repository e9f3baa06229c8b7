"""What a stage can say before it runs, by the recipes of what it reads and the speed of a machine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

ANSWER_TOKENS = 150  # of a sampled answer, far below the most that is allowed


@dataclass(frozen=True)
class Planned:
    """A stage in a plan: its recipe, and by role the stages that it reads."""

    name: str
    config: Any  # the stage's own Config
    reads: Mapping[str, "Planned"]
    before: tuple[Any, ...] = ()  # the recipes of all stages before it in the table


class Speed(NamedTuple):
    """How fast the processes of a stage work together, in tokens per second."""

    train: float
    read: float  # forward only
    write: float  # sampled answers, many at once
    update: float  # seconds of the optimizer, once a step


class Estimate(NamedTuple):
    """Seconds of a stage's work, and whether the amount of work is only about known."""

    seconds: float
    about: bool = False


def answer_tokens(most: int) -> int:
    """Tokens of a sampled answer that may have so many."""
    return min(ANSWER_TOKENS, most // 2)
