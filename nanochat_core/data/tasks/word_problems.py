"""Arithmetic word problems, solved by one call of the calculator.

The splits share no set of numbers. No number is above 99, so that each is one token and can be copied.
"""

import random
from pathlib import Path
from typing import NamedTuple

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

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
THINGS = ("apples", "books", "coins", "cards", "stamps", "pens", "shells", "stickers", "eggs", "marbles")


class Template(NamedTuple):
    """A story about a person {a}, another {b}, {things} and the numbers {x}, {y}, {z}."""

    story: str
    expression: str
    conclusion: str
    x: tuple[int, int] = (2, 99)
    y: tuple[int, int] = (2, 99)
    z: tuple[int, int] = (2, 99)


EASY = (
    Template(
        "{a} has {x} {things} and buys {y} more. How many {things} does {a} have now?",
        "{x}+{y}",
        "{a} has {r} {things} now.",
    ),
    Template(
        "{a} has {x} {things} and gives {y} of them to {b}. How many {things} are left?",
        "{x}-{y}",
        "{r} {things} are left.",
    ),
    Template(
        "There are {x} boxes with {y} {things} in each. How many {things} are there in all?",
        "{x}*{y}",
        "There are {r} {things} in all.",
        (2, 12),
        (2, 12),
    ),
    Template(
        "{a} has {x} {things} and {b} has {y}. How many {things} do they have together?",
        "{x}+{y}",
        "Together they have {r} {things}.",
    ),
    Template(
        "{a} needs {x} {things} and has {y}. How many more {things} does {a} need?",
        "{x}-{y}",
        "{a} needs {r} more {things}.",
    ),
    Template(
        "One pack holds {x} {things}. How many {things} are in {y} packs?",
        "{x}*{y}",
        "There are {r} {things}.",
        (2, 12),
        (2, 12),
    ),
)

HARD = (
    Template(
        "{a} has {x} {things}, buys {y} more and then gives {z} to {b}. How many {things} does {a} have now?",
        "{x}+{y}-{z}",
        "{a} has {r} {things} now.",
    ),
    Template(
        "There are {x} boxes with {y} {things} in each, and {z} more {things} on the table. "
        "How many {things} are there in all?",
        "{x}*{y}+{z}",
        "There are {r} {things} in all.",
        (2, 12),
        (2, 12),
    ),
    Template(  # {x} does not matter
        "{a} is {x} years old. {a} has {y} {things} and finds {z} more. How many {things} does {a} have now?",
        "{y}+{z}",
        "{a} has {r} {things} now.",
    ),
    Template(
        "{a} sells {x} {things} in the morning and {y} in the afternoon, for {z} dollars each. "
        "How many dollars does {a} get?",
        "({x}+{y})*{z}",
        "{a} gets {r} dollars.",
        (2, 30),
        (2, 30),
        (2, 9),
    ),
    Template(  # {z} does not matter
        "{a} had {x} {things} and lost {y}. {b} has {z}. How many {things} does {a} have left?",
        "{x}-{y}",
        "{a} has {r} {things} left.",
    ),
    Template(
        "A room has {x} rows of {y} chairs. {z} chairs are broken. How many chairs are good?",
        "{x}*{y}-{z}",
        "{r} chairs are good.",
        (2, 12),
        (2, 12),
        (2, 40),
    ),
    Template(
        "{a} reads {x} pages on Monday, {y} on Tuesday and {z} on Wednesday. How many pages is that in all?",
        "{x}+{y}+{z}",
        "That is {r} pages in all.",
    ),
    Template(  # {x} does not matter
        "{x} people work in a shop. {a} has {y} dollars and spends {z} of them there. "
        "How many dollars does {a} have left?",
        "{y}-{z}",
        "{a} has {r} dollars left.",
    ),
)


def one_step(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Six stories that take one operation; the test asks them with new numbers."""
    return Rows(
        "word_problems",
        rows(size, split),
        lambda i: _problem(EASY, split, generator("word_problems", split, i)),
        same_number,
    )


def two_steps(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Eight stories of two operations or with a number that does not matter; the test has new numbers."""
    return Rows(
        "word_problems_hard",
        rows(size, split),
        lambda i: _problem(HARD, split, generator("word_problems_hard", split, i)),
        same_number,
    )


def _problem(templates: tuple[Template, ...], split: Split, rng: random.Random) -> Problem:
    template = rng.choice(templates)
    a, b = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    while True:
        x, y, z = rng.randint(*template.x), rng.randint(*template.y), rng.randint(*template.z)
        numbers = (x, y, z) if "{z}" in template.story else (x, y)
        expression = template.expression.format(x=x, y=y, z=z)
        result = evaluate(expression)
        if result >= 0 and split_of(*numbers) == split:
            break
    words = {"a": a, "b": b, "things": things, "x": x, "y": y, "z": z, "r": result}
    return dialogue(
        template.story.format(**words),
        [*call(expression, str(result)), text(template.conclusion.format(**words))],
    )


def evaluate(expression: str) -> int:
    """The value of one of our own expressions: numbers with +, -, * and perhaps a first sum in brackets."""
    if expression.startswith("("):
        inner, rest = expression[1:].split(")")
        return evaluate(f"{evaluate(inner)}{rest}")
    for sign in "+-":
        left, found, right = expression.rpartition(sign)
        if found:
            return evaluate(left) + (evaluate(right) if sign == "+" else -evaluate(right))
    left, found, right = expression.rpartition("*")
    return evaluate(left) * int(right) if found else int(expression)
