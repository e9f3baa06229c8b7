"""Conversations of your own: a jsonl file, named in a mixture as custom_json:PATH."""

from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, contains_answer, kept_apart
from nanochat_core.data.tasks.identity import read


def load(path: Path, split: Split, size: int | None) -> Rows:
    """Lines that are lists of messages, or objects with `messages` and perhaps the `answer` to look for. One
    in 50 is for validation; a test asks about all, so name another file for it."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: custom_json:PATH names a jsonl file of conversations")
    listed = kept_apart(read(path), split)
    if not listed:
        raise ValueError(f"{path} has one conversation: two are needed, for one is kept for validation")

    def row(index: int) -> Problem:
        return listed[index]

    return Rows(f"custom_json:{path}", min(size or len(listed), len(listed)), row, contains_answer)
