"""Reading the text that the shards stage listed: its manifest, single row groups, or all documents."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

MANIFEST = "shards.json"
Split = Literal["train", "validation"]


class Shard(NamedTuple):
    """One parquet file with a string column `text`."""

    name: str
    path: Path
    size: int
    sha256: str
    rows: int
    row_groups: int


class Shards(NamedTuple):
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]


def shard_list(directory: Path, downloads: Path | None = None) -> Shards:
    """The shards that a finished `shards` job named, with absolute paths.

    The manifest's paths are relative to `base_dir/downloads`, and a job's directory is
    `base_dir/<stage>/<fingerprint>`.
    """
    root = downloads or directory.resolve().parents[1] / "downloads"
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    train, validation = (
        tuple(Shard(**(entry | {"path": root / entry["path"]})) for entry in manifest[split])
        for split in ("train", "validation")
    )
    return Shards(train, validation)


def row_group(path: Path, index: int) -> list[str]:
    """The documents of one row group."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        texts: list[str] = file.read_row_group(index, columns=["text"]).column("text").to_pylist()
    return texts


def texts(directory: Path, split: Split) -> Iterator[str]:
    """Every document of a split, in the order of the shards."""
    shards = shard_list(directory)
    for shard in shards.train if split == "train" else shards.validation:
        for index in range(shard.row_groups):
            yield from row_group(shard.path, index)
