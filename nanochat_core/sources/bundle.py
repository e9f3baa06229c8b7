"""A small evaluation bundle from the embedded corpus, in the files and formats of CORE's own.

What it asks is in the text that was pretrained on: it measures what was picked up, not what generalises.
"""

import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from nanochat_core.sources import corpus

EXAMPLES = 200  # of each task
FEWEST = 8  # a task with fewer is left out (the data wheel it needs is not installed)

Example = dict[str, object]


class Made(NamedTuple):
    """One task: CORE's name for its kind, examples shown before the question, chance in percent."""

    label: str
    kind: str
    shots: int
    chance: int
    examples: list[Example]


def tasks() -> list[Made]:
    """Seven tasks of three kinds, from what a tiny model picks up (the shape of a line) to recall."""
    made = [
        Made("factbook_labels", "multiple_choice", 0, 25, list(_labels())),
        Made("factbook_regions", "multiple_choice", 2, 25, list(_regions())),
        Made("factbook_capitals", "multiple_choice", 0, 25, list(_capitals())),
        Made("chitchat_replies", "multiple_choice", 0, 25, list(_replies())),
        Made("factbook_whose_capital", "schema", 0, 50, list(_whose_capital())),
        Made("factbook_units", "language_modeling", 1, 0, list(_units())),
        Made("factbook_recall", "language_modeling", 2, 0, list(_recall())),
    ]
    return [task for task in made if len(task.examples) >= FEWEST]


def files() -> dict[str, str]:
    """Every file of the bundle by its path: core.yaml, eval_meta_data.csv and the examples."""
    made = tasks()
    listing = ["icl_tasks:"]
    for task in made:
        listing += [
            f"- label: {task.label}",
            f"  dataset_uri: {task.label}.jsonl",
            f"  num_fewshot: [{task.shots}]",
            f"  icl_task_type: {task.kind}",
        ]
    chances = ["Eval Task,Random baseline", *(f"{task.label},{task.chance}" for task in made)]
    found = {"core.yaml": "\n".join(listing) + "\n", "eval_meta_data.csv": "\n".join(chances) + "\n"}
    for task in made:
        rows = (json.dumps(example, ensure_ascii=False) for example in task.examples)
        found[f"eval_data/{task.label}.jsonl"] = "\n".join(rows) + "\n"
    return found


def _choice(rng: random.Random, query: str, right: str, wrong: list[str]) -> Example:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"query": query, "choices": choices, "gold": choices.index(right)}


def _short_lines() -> dict[str, list[str]]:
    """Label to the short values it has in the factbook, for labels that many places have."""
    values: dict[str, set[str]] = defaultdict(set)
    for section in corpus.factbook_sections():
        for line in section.split("\n")[1:]:
            label, _, value = line.partition(": ")
            if 4 <= len(value) <= 40 and len(label) <= 40:
                values[label].add(value)
    return {label: sorted(found) for label, found in sorted(values.items()) if len(found) >= 40}


def _labels() -> Iterator[Example]:
    """Which value goes with a label, the others being values of other labels."""
    lines = _short_lines()
    rng = random.Random("factbook_labels")
    for _ in range(EXAMPLES if len(lines) >= 4 else 0):
        label, *others = rng.sample(list(lines), 4)
        yield _choice(
            rng, f"{label}:", rng.choice(lines[label]), [rng.choice(lines[other]) for other in others]
        )


def _units() -> Iterator[Example]:
    """The last word of a line that ends in a unit or an abbreviation."""
    ending = re.compile(r"(.+ \S+) (est\.\)|km|sq km|m)")
    found = [
        (label, matched)
        for label, values in _short_lines().items()
        for value in values
        if (matched := ending.fullmatch(value))
    ]
    rng = random.Random("factbook_units")
    for label, matched in rng.sample(found, min(EXAMPLES, len(found))):
        yield {"context": f"{label}: {matched[1]}", "continuation": matched[2]}


def _regions() -> Iterator[Example]:
    rng = random.Random("factbook_regions")
    regions = sorted({place.region for place in corpus.places()})
    for place in _places(rng):
        wrong = rng.sample([region for region in regions if region != place.region], 3)
        yield _choice(rng, f"{place.name} is in", place.region, wrong)


def _capitals() -> Iterator[Example]:
    rng = random.Random("factbook_capitals")
    capitals = sorted({place.capital for place in corpus.places()})
    for place in _places(rng):
        wrong = rng.sample([capital for capital in capitals if capital != place.capital], 3)
        yield _choice(rng, f"The capital of {place.name} is", place.capital, wrong)


def _whose_capital() -> Iterator[Example]:
    """Two places, one capital: which of the two beginnings makes it likelier."""
    rng = random.Random("factbook_whose_capital")
    places = corpus.places()
    for place in _places(rng):
        other = rng.choice([other for other in places if other.capital != place.capital])
        names = [place.name, other.name]
        rng.shuffle(names)
        yield {
            "context_options": [f"The capital of {name}" for name in names],
            "continuation": f"is {place.capital}.",
            "gold": names.index(place.name),
        }


def _recall() -> Iterator[Example]:
    for place in _places(random.Random("factbook_recall")):
        yield {"context": f"The capital of {place.name} is", "continuation": place.capital}


def _places(rng: random.Random) -> list[corpus.Place]:
    places = list(corpus.places())
    return rng.sample(places, min(EXAMPLES, len(places)))


def _replies() -> Iterator[Example]:
    """Which reply belongs to what was said, the others being replies from other conversations."""
    rng = random.Random("chitchat_replies")
    talks = [turns[i : i + 3] for turns in corpus.conversations() for i in (2,) if len(turns) > i + 2]
    talks = [talk for talk in talks if all(10 <= len(turn) <= 100 for turn in talk)]
    for _ in range(EXAMPLES if len(talks) >= 4 else 0):
        talk, *others = rng.sample(talks, 4)
        query = f"A: {talk[0]}\nB: {talk[1]}\nA:"
        yield _choice(rng, query, talk[2], [other[2] for other in others])
