"""A small flow of its own: any text into shuffled shards that a profile can train on."""

from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact

from nanochat_core.artifacts.progress import count
from nanochat_core.sources import repackage as work
from nanochat_core.sources.repackage import RepackageProgress, Wanted

terminal: ContextVar[Callable[[str], object] | None] = ContextVar("terminal", default=None)
"""Where a run started by hand says how far it is; a worker's has nobody to say it to."""


@flow(name="repackage", persist_result=False, validate_parameters=True)
def repackage(
    source: str,
    out: str,
    column: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    seed: int = 42,
    shard_chars: int = 250_000_000,
) -> dict[str, Any]:
    """Make shuffled parquet shards of any text, the last one for validation; go on if that was begun.

    Args:
        source: a file, folder, glob or fsspec URL of parquet, jsonl or txt; or OWNER/NAME of the hub
        out: the folder to fill
        column: the column or field that holds the text
        config: of a data set on the hub
        split: of a data set on the hub
        revision: of a data set on the hub; a commit pins it
        seed: of the shuffle
        shard_chars: characters of one shard
    """
    wanted = Wanted(source, column, config, split, revision, seed, shard_chars)
    folder = Path(out).expanduser().absolute()
    with work.at_work(folder):
        sort(wanted, folder)
        return write(wanted, folder)


@task(persist_result=False)
def sort(wanted: Wanted, out: Path) -> None:
    """Read every document and leave sorted runs."""
    work.sort(wanted, out, Telling("reading"))


@task(persist_result=False)
def write(wanted: Wanted, out: Path) -> dict[str, Any]:
    """Merge the runs into shards; what they hold."""
    shards = work.write(wanted, out, Telling("writing"))
    return {
        "folder": str(out),
        "train_shards": len(shards.train),
        "documents": sum(shard.rows for shard in shards.train),
        "validation_documents": sum(shard.rows for shard in shards.validation),
        "bytes": sum(shard.size for shard in shards.train + shards.validation),
    }


class Telling:
    """Says each step in the run's log, on its progress bar, and at the terminal."""

    def __init__(self, what: str) -> None:
        self.log, self.screen = get_run_logger(), terminal.get()
        bar = create_progress_artifact(0.0, key=f"repackage-{what}", description=what)
        assert isinstance(bar, UUID)
        self.bar = bar

    def __call__(self, step: RepackageProgress) -> None:
        words = f"{step.phase}  {count(step.documents)} documents, {count(step.chars)} characters"
        if step.fraction is not None:
            words += f", {step.fraction:.0%}"
            update_progress_artifact(self.bar, progress=100 * step.fraction)
        self.log.info(words)
        if self.screen is not None:
            self.screen(words)
