"""Whether the rows that a recipe names will be there: asked by the plan, not days later by a stage."""

from collections.abc import Collection
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


def check_rows(key: str, names: Collection[str], splits: tuple[Split, ...], assets: Brought) -> None:
    """Refuse a task without the splits that `key` reads, and one that the assets will not hold. Generated
    tasks need nothing."""
    for own in filter(None, map(own_file, names)):
        if not own.is_file():
            raise ValueError(f"{key} names {own}, which is not there: make the file, or take it out of {key}")
    needed = [name for name in dict.fromkeys(sliced(name)[0] for name in names) if name in SOURCES]
    for name in needed:
        for split in splits:
            if not SOURCES[name].has(split):
                known = " and ".join(SOURCES[name].splits)
                raise ValueError(
                    f"{key} needs {split} rows of {name}, which has {known} only: take it out of {key}"
                )
    absent = [name for name in needed if name not in assets.tasks]
    if absent:
        listed = ", ".join(f'"{name}"' for name in (*assets.tasks, *absent))
        raise ValueError(
            f"{key} needs {' and '.join(absent)}, which the assets leave out: set assets.tasks to [{listed}]"
        )
    for name in needed:
        _check_source(key, name, splits, assets)


def _check_source(key: str, name: str, splits: tuple[Split, ...], assets: Brought) -> None:
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
