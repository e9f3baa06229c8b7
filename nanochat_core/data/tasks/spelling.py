"""Spelling a word and counting a letter in it: letters are what a model that sees tokens does not see.

Without a downloaded word list the words are a closed set of about 300, and spelling is asked alike in train
and test. Of the pairs of word and letter to count, one in eight is kept for validation and test.
"""

import functools
import string
from pathlib import Path

from nanochat_core.data.tasks.base import (
    UNBOUNDED,
    Problem,
    Rows,
    Split,
    call,
    dialogue,
    generator,
    rows,
    same_number,
    split_of,
    spoken,
    text,
)
from nanochat_core.data.tasks.words import WORDS, word_list

OPEN = 1_000  # words: of a list this long the model does not learn each, so one in eight is kept from it
STRIDE = 7919  # a prime, so that a short view is not all of one letter
SPELL = ("Spell the word {}.", "How do you spell {}?", "Spell {}.")
COUNT = (
    "How many times does the letter {} occur in {}?",
    "How many {} are in {}?",
    "Count the letter {} in the word {}.",
)


def spelled(word: str) -> str:
    return " ".join(word)


def spelling(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Row i asks for word i, beginning again after the last one, in one of three wordings."""
    words = word_list(assets)
    if len(words) >= OPEN:
        words = tuple(word for word in words if split_of(word) == split)

    def row(index: int) -> Problem:
        word = words[index * STRIDE % len(words)]
        question = generator("spelling", split, index).choice(SPELL).format(word)
        return dialogue(question, spelled(word))

    return Rows("spelling", size if size is not None else min(len(words), UNBOUNDED), row, same_letters)


def same_letters(conversation: Problem, answer: str) -> bool:
    """Right if the letters are, in their order; how they are set apart does not matter."""

    def letters(words: str) -> list[str]:
        return [letter for letter in words if letter.isalpha()]

    content = conversation["messages"][-1]["content"]
    assert isinstance(content, str)
    return letters(spoken(answer)) == letters(content) and answer.count(" ") >= len(letters(content)) - 1


def counting(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Spell the word, then let the tool count: nine times in ten a letter that is in it."""

    def row(index: int) -> Problem:
        rng = generator("counting", split, index)
        pairs = _pairs(split, rng.random() < 0.9)
        word, letter = rng.choice(pairs)
        number = word.count(letter)
        times = f"{number} time" if number == 1 else f"{number} times"
        return dialogue(
            rng.choice(COUNT).format(letter, word),
            [
                text(f"{spelled(word)} "),
                *call(f"'{word}'.count('{letter}')", str(number)),
                text(f"{letter} occurs {times}."),
            ],
        )

    return Rows("counting", rows(size, split), row, same_number)


@functools.cache
def _pairs(split: Split, present: bool) -> list[tuple[str, str]]:
    """Word and letter, of one split, with the letter in the word or not."""
    return [
        (word, letter)
        for word in WORDS
        for letter in string.ascii_lowercase
        if (letter in word) == present and split_of(word, letter) == split
    ]
