"""The transcript of a training stage: a line for each checkpoint, which holds the hash of the line before.

Nobody can change, remove or insert a line without breaking the chain. Lines are only appended: a run that
goes back to a checkpoint writes a step's line again, and the two can be compared.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import store

FILE = "transcript.jsonl"


def append(directory: Path, facts: Mapping[str, Any]) -> None:
    path = directory / FILE
    text = path.read_text() if path.exists() else ""
    previous = digest(text.splitlines()[-1]) if text else ""
    store.write_whole(path, text + json.dumps({**facts, "previous": previous}) + "\n")


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines in the order they were written; Damaged where the chain breaks."""
    path = directory / FILE
    found, previous = [], ""
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            intact = line["previous"] == previous
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise store.Damaged(f"the chain of {FILE} breaks at line {number}")
        found.append(line)
        previous = digest(text)
    return found


def hashes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What a checkpoint's manifest lists, as a line names it: weights, and all ranks' optimizer states and
    places in the data."""

    def of_ranks(kind: str) -> str:
        names = sorted(name for name in files if name.startswith("rank_") and name.endswith(kind))
        return digest("".join(files[name]["sha256"] for name in names))

    weights = files["model.safetensors"]["sha256"]
    return {"cursor": of_ranks(".json"), "weights": weights, "optimizer": of_ranks(".safetensors")}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
