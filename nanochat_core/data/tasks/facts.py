"""What the factbook says, as questions and answers: what midtraining turns from prose into dialogue.

A closed set: every fact is also in the text that was pretrained on.
"""

import functools
import random
from collections import Counter
from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, dialogue
from nanochat_core.sources import corpus


@functools.cache
def exchanges() -> tuple[tuple[str, str], ...]:
    """Question and answer, a handful for each place."""
    found: list[tuple[str, str]] = []
    capitals = Counter(place.capital for place in corpus.places())
    for place in corpus.places():
        name = place.name
        found.append((f"What is the capital of {name}?", f"The capital of {name} is {place.capital}."))
        if capitals[place.capital] == 1:
            found.append((f"What is {place.capital}?", f"{place.capital} is the capital of {name}."))
        found.append((f"Where is {name}?", f"{name} is in {place.region}."))
        if place.currency:
            found.append(
                (f"What do people pay with in {name}?", f"In {name} people pay with {place.currency}.")
            )
        if place.peak:
            found.append(
                (f"What is the highest point of {name}?", f"The highest point of {name} is {place.peak}.")
            )
        if place.neighbours:
            listed = ", ".join(place.neighbours[:6])
            found.append((f"Which countries are next to {name}?", f"{name} is next to {listed}."))
    random.Random("facts").shuffle(found)
    return tuple(found)


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Row i is fact i in a fixed order, beginning again after the last one; all splits are the same."""
    facts = exchanges()

    def row(index: int) -> Problem:
        return dialogue(*facts[index % len(facts)])

    return Rows("facts", size if size is not None else len(facts), row)
