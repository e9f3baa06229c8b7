"""The bare form of a calculator call, with no story around it. The splits share no expression."""

from pathlib import Path

from nanochat_core.data.tasks.base import (
    Problem,
    Rows,
    Split,
    call,
    dialogue,
    generator,
    rows,
    same_number,
    split_of,
    text,
)
from nanochat_core.data.tasks.word_problems import evaluate

QUESTIONS = ("What is {}?", "Compute {}.", "Calculate {}.", "How much is {}?")


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Two or three numbers up to 99 and +, - or *."""

    def row(index: int) -> Problem:
        rng = generator("tool_format", split, index)
        while True:
            numbers = [rng.randint(2, 99) for _ in range(rng.choice((2, 2, 3)))]
            expression = str(numbers[0]) + "".join(f"{rng.choice('+-*')}{n}" for n in numbers[1:])
            result = evaluate(expression)
            if result >= 0 and split_of(expression) == split:
                break
        question = rng.choice(QUESTIONS).format(expression)
        return dialogue(question, [*call(expression, str(result)), text(f"It is {result}.")])

    return Rows("tool_format", rows(size, split), row, same_number)
