"""Whether the rows that a recipe names will be there: asked by the plan, not days later by a stage."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from nanochat_core.data.tasks import own_file, sliced
from nanochat_core.data.tasks.base import Split
from nanochat_core.data.tasks.tables import SOURCES, given


class Brought(Protocol):
    """What the assets stage is told to bring."""

    @property
    def source(self) -> str: ...
    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def task_folder(self) -> str | None: ...


def check_rows(key: str, names: Iterable[str], splits: tuple[Split, ...], assets: Brought) -> None:
    """Refuse a task without the splits that `key` reads, and one that the assets will not hold. Generated
    tasks need nothing."""
    for name in names:
        whole = sliced(name)[0]
        own = own_file(name)
        if own is not None and not own.is_file():
            raise ValueError(f"{key} names {own}, which is not there: make the file, or take it out of {key}")
        if whole in SOURCES:
            _check_source(key, whole, splits, assets)


def _check_source(key: str, name: str, splits: tuple[Split, ...], assets: Brought) -> None:
    source = SOURCES[name]
    for split in splits:
        if not source.has(split):
            known = " and ".join(source.splits)
            raise ValueError(
                f"{key} needs {split} rows of {name}, which has {known} only: take it out of {key}"
            )
    if name not in assets.tasks:
        listed = ", ".join(f'"{each}"' for each in (*assets.tasks, name))
        raise ValueError(f"{key} needs {name}, which the assets leave out: set assets.tasks to [{listed}]")
    if assets.task_folder is not None:
        folder = Path(assets.task_folder)
        for split in splits:
            found = "train" if split == "validation" else split
            if folder.is_dir() and not given(folder, name, found):  # one that is away may not be needed
                where = f"{assets.task_folder}/{name}/{found}.parquet"
                raise ValueError(f"{key} needs {name}: neither {where} nor .jsonl is there; bring that file")
    elif assets.source != "hub":
        raise ValueError(
            f"{key} needs {name}, which is not among the embedded data: set assets.source to hub, or "
            f"assets.task_folder to a folder that holds {name}/{splits[0]}.parquet or .jsonl"
        )
