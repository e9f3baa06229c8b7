"""Reading the text that the shards stage listed: its manifest, single row groups, or all documents."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat_core.store import Damaged, sha256

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


class Reader:
    """Row groups of shards whose bytes are those that were listed: each file is hashed when it is first read
    from, and again if it was written to since."""

    def __init__(self) -> None:
        self.trusted: dict[Path, int] = {}  # when the file that was hashed had been written

    def row_group(self, shard: Shard, index: int) -> list[str]:
        try:
            written = shard.path.stat().st_mtime_ns
            if self.trusted.get(shard.path) != written:
                if sha256(shard.path) != shard.sha256:
                    raise Damaged(f"shard {shard.path} has changed since it was listed (its hash is another)")
                self.trusted[shard.path] = written
            return row_group(shard.path, index)
        except FileNotFoundError:
            raise Damaged(f"shard {shard.path} is missing") from None


def texts(directory: Path, split: Split) -> Iterator[str]:
    """Every document of a split, in the order of the shards."""
    shards, reader = shard_list(directory), Reader()
    for shard in shards.train if split == "train" else shards.validation:
        for index in range(shard.row_groups):
            yield from reader.row_group(shard, index)
