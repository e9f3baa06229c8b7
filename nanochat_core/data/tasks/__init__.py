"""Every task by name. A new one is a file beside this one and a line in the table.

A name may end in a slice, [start:stop:step], and then means these rows only.
"""

import re
from pathlib import Path

from nanochat_core.data.tasks import (
    arc,
    capitals,
    chitchat,
    choices,
    custom_json,
    facts,
    gsm8k,
    humaneval,
    identity,
    mmlu,
    smoltalk,
    spelling,
    spellingbee,
    tool_format,
    word_problems,
)
from nanochat_core.data.tasks.base import Loader, Problem, Split, Task, View

__all__ = ["TASKS", "Problem", "Split", "Task", "check_name", "load_task", "own_file", "sliced"]

SLICE = re.compile(r"(.*)\[(-?\d*):(-?\d*)(?::(-?\d*))?\]")

TASKS: dict[str, Loader] = {
    # generated, need no network
    "word_problems": word_problems.one_step,
    "word_problems_hard": word_problems.two_steps,
    "capitals": capitals.load,
    "spelling": spelling.spelling,
    "counting": spelling.counting,
    "identity": identity.load,
    "chitchat": chitchat.load,
    "facts": facts.load,
    "choices": choices.load,
    "tool_format": tool_format.load,
    "spellingbee": spellingbee.load,
    # data sets that the assets stage brings
    "arc_easy": arc.easy,
    "arc_challenge": arc.challenge,
    "mmlu": mmlu.load,
    "gsm8k": gsm8k.load,
    "humaneval": humaneval.load,
    "smoltalk": smoltalk.load,
}


def check_name(name: str) -> str:
    """The name, if a task has it: to be asked before a run begins, not days later."""
    whole, rows = sliced(name)
    if whole not in TASKS and not whole.startswith("custom_json:"):
        raise ValueError(f"there is no task {whole!r}; the tasks are {', '.join(TASKS)}, custom_json:PATH")
    if rows.step == 0:
        raise ValueError(f"{name}: the step of a slice cannot be 0")
    return name


def own_file(name: str) -> Path | None:
    """The user's file that a task is made of, if it is."""
    kind, _, path = sliced(name)[0].partition(":")
    return Path(path).expanduser() if kind == "custom_json" else None


def sliced(name: str) -> tuple[str, slice]:
    """A task's own name, and which of its rows are meant."""
    found = SLICE.fullmatch(name)
    if found is None:
        return name, slice(None)
    start, stop, step = (int(text) if text else None for text in found.groups()[1:])
    return found[1], slice(start, stop, step)


def load_task(name: str, split: Split, *, size: int | None = None, assets: Path | None = None) -> Task:
    """A task's rows of one split. Generators make `size` of them, data sets give their first `size`."""
    whole, rows = sliced(check_name(name))
    reach = size if rows == slice(None) else rows.stop if (rows.stop or -1) > 0 else None  # of generators
    mine = own_file(name)
    task = TASKS[whole](split, reach, assets) if mine is None else custom_json.load(mine, split, reach)
    return task if rows == slice(None) else View(name, task, range(*rows.indices(len(task)))[:size])
