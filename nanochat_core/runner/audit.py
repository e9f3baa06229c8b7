"""Replays stretches of a training stage between two checkpoints that are kept, and compares the bits."""

import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store, transcript
from nanochat_core.runner.exits import last_words
from nanochat_core.runner.launch import lock_path, started, stop

COMPARED = ("weights", "optimizer", "cursor")
SAME = ("skip", "ranks", "precision", "code")  # of both ends, or what lies between is not only arithmetic


Line = dict[str, Any]


class Stretch(NamedTuple):
    """Two neighbouring checkpoints, and what the transcript says of each."""

    folder: Path  # of the first
    begin: Line
    end: Line


def stretches(directory: Path) -> Iterator[Stretch]:
    """What of a stage can be replayed. A checkpoint that the transcript does not know is Damaged."""
    lines = transcript.read(directory)
    kept = [
        path for place in ("checkpoints", store.AUDITS) for path in (directory / place).glob("step_????????")
    ]
    known = [(folder, _line_of(folder, lines)) for folder in sorted(kept, key=lambda path: path.name)]
    for (folder, begin), (_, end) in pairwise(known):
        between = any(begin["step"] < line["step"] < end["step"] for line in lines)
        if not between and all(begin[key] == end[key] for key in SAME):
            yield Stretch(folder, begin, end)


def _line_of(folder: Path, lines: list[Line]) -> Line:
    from nanochat_core.train.checkpoint import damage, step_of

    why = damage(folder)
    if why is not None:
        raise store.Damaged(f"checkpoint {folder.name} is damaged: {why}")
    here = transcript.hashes(json.loads((folder / "manifest.json").read_text())["files"])
    for line in reversed(lines):
        if line["step"] == step_of(folder) and all(line[key] == here[key] for key in COMPARED):
            return line
    raise store.Damaged(f"checkpoint {folder.name} is not the one that the transcript names")


def replay(directory: Path, base_dir: Path, stretch: Stretch) -> list[str]:
    """Train from one end of a stretch to the other, beside the original; which of `COMPARED` differ."""
    job = json.loads((directory / "job.json").read_text())
    work = directory.with_name(directory.name + ".audit")
    lock = lock_path(base_dir, job["stage"], job["fingerprint"])
    with store.locked(lock, wait=False) as free:
        if not free:
            raise ValueError(f"{job['stage']} is at work; audit it when it has ended")
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(stretch.folder, work / "checkpoints" / stretch.folder.name, copy_function=os.link)
        for rows in (directory / "checkpoints").glob("rows_*.json"):  # that fit the device: they decide bits
            shutil.copy(rows, work / "checkpoints")
    job["runtime"] |= {"base_dir": str(base_dir), "stop_step": stretch.end["step"], "audit_stretches": 0}
    store.write_json(work / "job.json", job)
    process = started(work)
    try:
        process.wait()
        found = [line for line in transcript.read(work) if line["step"] == stretch.end["step"]]
        if not found:
            raise ValueError(
                f"the replay did not get there: {last_words(work / 'log.txt', 0, process.returncode)}"
            )
        return [key for key in COMPARED if found[-1][key] != stretch.end[key]]
    finally:
        stop(process)
        shutil.rmtree(work, ignore_errors=True)
