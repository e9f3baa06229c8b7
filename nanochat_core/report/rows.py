"""A finished row's directory, read: its job, its result, its attempts and the machine meanwhile."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Metrics, Stage


class Finished(NamedTuple):
    """One row's directory, read."""

    directory: Path
    job: dict[str, Any]
    result: dict[str, Any]
    attempts: list[dict[str, Any]]
    stage: Stage

    @property
    def metrics(self) -> Metrics:
        return dict(self.result["metrics"])

    @property
    def runtime(self) -> dict[str, Any]:
        return dict(self.job.get("runtime", {}))

    def readings(self) -> list[dict[str, Any]]:
        """How the machine was while the stage worked, in the order of time."""
        return [row for row in read_lines(self.directory / "machine.jsonl") if "time" in row]


def read_finished(directory: Path, stage: Stage) -> Finished:
    result = store.read_result(directory)
    if result is None:
        raise ValueError(f"{directory} is not finished; the report reads finished stages only")
    job = json.loads((directory / "job.json").read_text())
    return Finished(directory, job, result, store.read_attempts(directory), stage)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; one that a power loss cut is passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
