"""Capitals as lettered multiple choice, the way ARC and MMLU ask.

No place is in two splits. A model of a few million parameters answers at chance (0.25),
also for places whose capital it can name: tying a letter to a choice is what it has not learnt.
"""

import random
from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, generator, multiple_choice, same_text
from nanochat_core.sources import corpus


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """Row i asks about place i of its split, with three other capitals of the split to choose from."""
    of: tuple[Split, ...] = ("test", "train", "train", "train", "validation", "train", "train", "train")
    places = [place for i, place in enumerate(corpus.places()) if of[i % len(of)] == split]
    random.Random("choices").shuffle(places)

    def row(index: int) -> Problem:
        rng = generator("choices", split, index)
        place = places[index % len(places)]
        others = sorted({other.capital for other in places} - {place.capital})
        options = [place.capital, *rng.sample(others, 3)]
        rng.shuffle(options)
        return multiple_choice(f"What is the capital of {place.name}?", options, options.index(place.capital))

    size = size if size is not None else len(places)
    return Rows("choices", size, row, same_text, kind="categorical", baseline=0.25)
