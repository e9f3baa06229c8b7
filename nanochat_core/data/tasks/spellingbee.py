"""How many times a letter occurs in a word: spelled and counted by hand, then checked with the tool.

The words are those of the assets. No pair of word and letter is in two splits.
"""

from pathlib import Path

from nanochat_core.data.tasks.base import (
    Problem,
    Rows,
    Split,
    call,
    dialogue,
    final_number,
    generator,
    rows,
    split_of,
    text,
)
from nanochat_core.data.tasks.words import word_list
from nanochat_core.tokenizer.render import Part

QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are there in the word {word}?",
    "How many times does {letter} occur in {word}?",
    "How often does {letter} appear in {word}?",
    "Count the {letter} in {word}.",
    "Count how many {letter} the word {word} has.",
    "What is the number of {letter} in {word}?",
    "In the word {word}, how many {letter} are there?",
    "Number of {letter} in {word}?",
    "{word}: how many {letter}?",
    "Tell me how many {letter} you see in {word}.",
    "Wie viele {letter} sind in {word}?",
    "Wie oft kommt {letter} in {word} vor?",
    "Combien de {letter} y a-t-il dans {word} ?",
    "¿Cuántas {letter} hay en {word}?",
    "Quante {letter} ci sono in {word}?",
)
QUOTES = ("", "'", '"')
ASKED = 256  # rows of the test, as published


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Nine times in ten the letter is one of the word's; quotes and case vary."""
    words = word_list(assets)
    if not any(split_of(word, letter) == split for word in words for letter in word):
        raise ValueError(f"the list of {len(words)} words has none for {split}: bring a longer one")

    def row(index: int) -> Problem:
        rng = generator("spellingbee", split, index)
        while True:
            word = rng.choice(words)
            letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
            if split_of(word, letter) == split:
                break
        quote = rng.choice(QUOTES), rng.choice(QUOTES)
        asked = rng.choice(QUESTIONS).format(
            letter=f"{quote[0]}{letter}{quote[0]}", word=f"{quote[1]}{word}{quote[1]}"
        )
        return dialogue(asked.lower() if rng.random() < 0.2 else asked, answer(word, letter))

    size = ASKED if size is None and split == "test" else rows(size, split)
    return Rows("spellingbee", size, row, final_number)


def answer(word: str, letter: str) -> list[Part]:
    """Each letter on a line of its own, hits numbered; then the same by the tool."""
    lines = []
    hits = 0
    for each in word:
        hits += each == letter
        lines.append(f"{each} {hits}" if each == letter else each)
    listed = "\n".join(lines)
    return [
        text(f"I spell {word} and count {letter}:\n{listed}\nThat makes {hits}. Python says: "),
        *call(f"'{word}'.count('{letter}')", str(hits)),
        text(f"\n\n#### {hits}"),
    ]
