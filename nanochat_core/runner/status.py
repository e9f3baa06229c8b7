"""Where a run stands, read off the disk: what is done, what is at work and how far, what waits."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nanochat_core.artifacts import store
from nanochat_core.artifacts.progress import Pace, is_progress
from nanochat_core.artifacts.stage import Metrics
from nanochat_core.runner.launch import lock_path
from nanochat_core.runner.plan import latest_run, latest_table, saved_step

TAIL_BYTES = 20_000  # of a metrics file, enough for the pace


class Standing(NamedTuple):
    """One row of a run."""

    stage: str
    state: Literal["done", "running", "interrupted", "damaged", "waiting"]
    directory: Path
    seconds: float | None = None
    metrics: Metrics | None = None
    row: Mapping[str, Any] | None = None  # the latest line of progress
    left: float | None = None  # seconds
    note: str = ""


def standings(base_dir: Path, jobs: Mapping[str, str]) -> list[Standing]:
    """Each row of a run (row -> fingerprint)."""
    return [standing(base_dir, stage, fingerprint) for stage, fingerprint in jobs.items()]


def standing(base_dir: Path, stage: str, fingerprint: str) -> Standing:
    directory = base_dir / stage / fingerprint
    if at_work(lock_path(base_dir, stage, fingerprint)):
        again = directory.with_name(directory.name + ".rerun")
        row, left = last_row(again if again.exists() else directory)
        return Standing(stage, "running", directory, row=row, left=left)
    try:
        result = store.verify(directory, base_dir)
    except ValueError as damage:
        return Standing(stage, "damaged", directory, note=str(damage))
    if result is not None:
        return Standing(stage, "done", directory, result["seconds"], result["metrics"])
    step = saved_step(directory)
    if step is not None:
        row, _ = last_row(directory)
        return Standing(stage, "interrupted", directory, row=row, note=f"a checkpoint at step {step}")
    return Standing(stage, "waiting", directory)


def at_work(lock: Path) -> bool:
    """Whether a living process holds a job's lock."""
    if not lock.exists():
        return False
    with store.locked(lock, wait=False) as free:
        return not free


def last_row(directory: Path) -> tuple[Mapping[str, Any] | None, float | None]:
    """The latest line of a job's progress, and the seconds left by the pace of the last ones."""
    try:
        with (directory / "metrics.jsonl").open("rb") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - TAIL_BYTES))
            lines = f.read().split(b"\n")
    except FileNotFoundError:
        return None, None
    pace, row, left = Pace(), None, None
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:  # the cut line at the beginning, or one being written
            continue
        if is_progress(found):
            row, left = found, pace.see(found)
    return row, left


def find_model(base_dir: Path, model: str | None) -> Path:
    """The directory a MODEL means: a stage of the latest run, an artefact's directory or an exported one."""
    if model is not None and (Path(model).is_dir() or "/" in model):
        if not Path(model).is_dir():
            raise ValueError(f"there is no directory {model}")
        return Path(model)
    latest, table = latest_run(base_dir) or {}, latest_table(base_dir)
    trained = [stage for stage in reversed(table) if stage in latest and table[stage].trains]
    if not latest or not trained:
        raise ValueError(f"nothing has been trained in {base_dir} yet; try: nanochat run cpu-demo")
    for stage in [model] if model else trained:
        if stage not in latest:
            raise ValueError(f"the latest run has no stage {stage!r}; it has: {', '.join(trained)}")
        if stage not in trained:
            raise ValueError(f"{stage} leaves no model to talk to; these do: {', '.join(trained)}")
        directory = base_dir / stage / latest[stage]
        if store.verify(directory, base_dir) is not None:
            return directory
    raise ValueError(f"{model or 'no model'} of the latest run is not finished; see: nanochat status")
