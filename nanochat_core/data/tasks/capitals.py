"""Capitals of the world, answered in a sentence.

A closed set: train and test ask about the same places, so this measures recall and nothing more.
"""

import random
import unicodedata
from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, dialogue, generator
from nanochat_core.sources import corpus

QUESTIONS = (
    "What is the capital of {}?",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Do you know the capital of {}?",
)


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Row i asks about place i (and begins again after the last one), in one of four wordings."""
    places = list(corpus.places())
    random.Random("capitals").shuffle(places)  # so that a short view is not all of one letter

    def row(index: int) -> Problem:
        place = places[index % len(places)]
        question = generator("capitals", split, index).choice(QUESTIONS).format(place.name)
        problem = dialogue(question, f"The capital of {place.name} is {place.capital}.")
        problem["answer"] = place.capital
        return problem

    return Rows("capitals", size if size is not None else len(places), row, names_capital)


def names_capital(conversation: Problem, answer: str) -> bool:
    """Right if the answer ends in the capital; accents and case do not count."""
    return _folded(answer).rstrip(". ").endswith(_folded(conversation["answer"]).rstrip("."))


def _folded(words: str) -> str:
    letters = unicodedata.normalize("NFD", words)
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()
