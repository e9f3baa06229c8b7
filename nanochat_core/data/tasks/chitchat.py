"""Small talk between real people as exchanges of user and assistant: a tone to learn, with nothing to mark.

Each split comes from conversations of its own.
"""

import functools
from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, dialogue, split_of
from nanochat_core.sources import corpus

PLAIN = (  # when the wheel with the conversations is not installed
    ("Hello!", "Hi there! How are you?"),
    ("Hi, how are you?", "I'm doing well, thank you! And you?"),
    ("Good morning!", "Good morning! Did you sleep well?"),
    ("Thank you!", "You're welcome!"),
    ("What are you doing?", "I'm just talking with you. What about you?"),
    ("I'm tired today.", "I'm sorry to hear that. Did you sleep badly?"),
    ("I like music.", "Me too! What do you listen to?"),
    ("Goodbye!", "Goodbye! It was nice to talk."),
)


@functools.cache
def pairs(split: Split) -> tuple[tuple[str, str], ...]:
    """What one said and what the other answered, both of 3 to 150 characters; each turn is used once."""
    found = [
        (said, answered)
        for i, turns in enumerate(corpus.conversations())
        if split_of("chitchat", i) == split
        for said, answered in zip(turns[::2], turns[1::2], strict=False)
        if 3 <= len(said) <= 150 and 3 <= len(answered) <= 150
    ]
    return tuple(found) or PLAIN


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Row i is exchange i, beginning again after the last one."""
    exchanges = pairs(split)

    def row(index: int) -> Problem:
        return dialogue(*exchanges[index % len(exchanges)])

    return Rows("chitchat", size if size is not None else len(exchanges), row)
