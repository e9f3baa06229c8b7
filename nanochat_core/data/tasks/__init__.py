"""Every task by name. A new one is a file beside this one and a line in the table."""

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
from nanochat_core.data.tasks.base import Loader, Problem, Split, Task

__all__ = ["TASKS", "Problem", "Split", "Task", "check_name", "load_task"]

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
    if name not in TASKS and not name.startswith("custom_json:"):
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}, custom_json:PATH")
    return name


def load_task(name: str, split: Split, *, size: int | None = None, assets: Path | None = None) -> Task:
    """A task's rows of one split. Generators make `size` of them, data sets give their first `size`."""
    check_name(name)
    kind, _, argument = name.partition(":")
    return custom_json.load(argument, size) if kind == "custom_json" else TASKS[name](split, size, assets)
