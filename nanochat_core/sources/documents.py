"""Reading the text that the shards stage listed: its manifest, single row groups, or all documents."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat_core.artifacts.store import Damaged

MANIFEST = "shards.json"
Split = Literal["train", "validation"]


class Shard(NamedTuple):
    """One parquet file with a string column `text`."""

    name: str
    path: Path
    size: int
    sha256: str
    rows: int  # that hold text
    row_groups: int


class Texts(NamedTuple):
    """Documents in memory, all with text, read like a shard of one row group."""

    documents: tuple[str, ...]
    row_groups: int = 1

    @property
    def rows(self) -> int:
        return len(self.documents)


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


def row_group(source: Path | bytes, index: int) -> list[str]:
    """The documents of one row group of a file, or of its content. What is null or blank is none: the places
    that a cursor names are counted without it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(source if isinstance(source, Path) else pa.BufferReader(source)) as file:
        texts = file.read_row_group(index, columns=["text"]).column("text").to_pylist()
    return [text for text in texts if text and not text.isspace()]


class ShardReader:
    """Row groups of shards whose bytes are those that were listed. The shard being read is kept in memory
    (100 MB of the usual data sets), so that what was hashed and what is read are the same bytes."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.data = b""

    def row_group(self, shard: Shard | Texts, index: int) -> list[str]:
        if isinstance(shard, Texts):
            return list(shard.documents)
        if self.path != shard.path:
            try:
                data = shard.path.read_bytes()
            except FileNotFoundError:
                raise Damaged(f"shard {shard.path} is missing") from None
            if hashlib.sha256(data).hexdigest() != shard.sha256:
                raise Damaged(f"shard {shard.path} has changed since it was listed (its hash is another)")
            self.path, self.data = shard.path, data
        return row_group(self.data, index)


def texts(directory: Path, split: Split) -> Iterator[str]:
    """Every document of a split, in the order of the shards."""
    shards, reader = shard_list(directory), ShardReader()
    for shard in shards.train if split == "train" else shards.validation:
        for index in range(shard.row_groups):
            yield from reader.row_group(shard, index)
