"""The hub's data sets that tasks are made of: where each comes from, and how its rows are read.

The assets stage brings them, as Arrow files that every rank maps into memory; tasks themselves never use the
network.
"""

import functools
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat_core.data.tasks.base import Split
from nanochat_core.sources.hub_rows import hub_rows
from nanochat_core.sources.retry import Patience

if TYPE_CHECKING:
    import pyarrow as pa

BY_HAND = "bring its rows by hand as TASK/SPLIT.parquet in a folder and set assets.task_folder"
FOLDER = "tasks"  # in the assets: tasks/<name>/<split>.arrow
HELD_OUT = 20  # of so many train rows one is for validation, where a data set has no split for that,
MOST_HELD_OUT = 1000  # and not more than this


class Source(NamedTuple):
    """A data set of the hub, its commit, and what its splits are called there."""

    repo: str
    config: str | None
    revision: str
    splits: Mapping[Split, str]  # without validation: some of the train rows, not trained on
    columns: tuple[str, ...]  # that a row must have

    def has(self, split: Split) -> bool:
        return split in self.splits or (split == "validation" and "train" in self.splits)


SOURCES: dict[str, Source] = {
    "arc_easy": Source(
        "allenai/ai2_arc",
        "ARC-Easy",
        "210d026faf9955653af8916fad021475a3f00453",
        {"train": "train", "validation": "validation", "test": "test"},
        ("question", "choices", "answerKey"),
    ),
    "arc_challenge": Source(
        "allenai/ai2_arc",
        "ARC-Challenge",
        "210d026faf9955653af8916fad021475a3f00453",
        {"train": "train", "validation": "validation", "test": "test"},
        ("question", "choices", "answerKey"),
    ),
    "mmlu": Source(
        "cais/mmlu",
        "all",
        "c30699e8356da336a370243923dbaf21066bb9fe",
        {"train": "auxiliary_train", "validation": "validation", "test": "test"},
        ("question", "choices", "answer"),
    ),
    "gsm8k": Source(
        "openai/gsm8k",
        "main",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        {"train": "train", "test": "test"},
        ("question", "answer"),
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        None,
        "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
        {"test": "test"},
        ("prompt", "canonical_solution", "test", "entry_point"),
    ),
    "smoltalk": Source(
        "HuggingFaceTB/smol-smoltalk",
        None,
        "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
        {"train": "train", "test": "test"},
        ("messages",),
    ),
}


class ArrowTable:
    """Rows of an Arrow file in a fixed shuffled order, or a part of that order."""

    def __init__(self, path: Path, part: slice = slice(None)) -> None:
        import pyarrow as pa

        with pa.memory_map(str(path)) as source:
            self.rows: pa.Table = pa.ipc.open_file(source).read_all()
        self.order = list(range(self.rows.num_rows))
        random.Random(42).shuffle(self.order)
        self.order = self.order[part]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = self.rows.slice(self.order[index], 1).to_pylist()[0]
        return row


@functools.cache
def table(name: str, split: Split, assets: Path | None) -> ArrowTable:
    """A data set that the assets stage has brought. Where it has no validation split, the end of the shuffled
    train split is that, and train is what comes before."""
    if not SOURCES[name].has(split):
        raise ValueError(f"{name} has no {split} split")
    folder = Path() if assets is None else assets / FOLDER / name
    own = (folder / "validation.arrow").is_file()
    file = "train" if split == "validation" and not own else split
    path = folder / f"{file}.arrow"
    if assets is None or not path.is_file():
        raise ValueError(
            f"the assets hold no {name} ({file}): add it to assets.tasks, with assets.source = hub, or with "
            f"assets.task_folder = a folder that holds {name}/{file}.parquet or .jsonl"
        )
    if own or split == "test":
        return ArrowTable(path)
    rows = len(ArrowTable(path))
    if rows < 2:
        raise ValueError(f"{name} (train) has one row: two are needed, for one is kept for validation")
    first = rows - min(MOST_HELD_OUT, max(1, rows // HELD_OUT))
    return ArrowTable(path, slice(first, None) if split == "validation" else slice(first))


def given(folder: Path, name: str, split: Split) -> bool:
    """Whether a user's folder has a split."""
    return any((folder / name / f"{split}{suffix}").is_file() for suffix in (".parquet", ".jsonl"))


def bring(name: str, split: Split, path: Path, folder: Path | None, patience: Patience | None) -> int:
    """Write one split as an Arrow file, from the hub or from a folder of the user's; returns its rows.

    `patience` is for the hub; None: only the cache of its library is used.
    """
    import pyarrow as pa

    source = SOURCES[name]
    if folder is None:
        rows = hub_rows(source.repo, source.config, source.splits[split], source.revision, patience, BY_HAND)
    else:
        rows = _from_folder(folder / name, split)
    if name == "mmlu" and rows.column_names == ["train"]:  # the hub has each row wrapped once more
        rows = pa.Table.from_struct_array(rows.column("train").combine_chunks())
    origin = f"{source.repo} ({source.splits[split]})" if folder is None else str(folder / name)
    absent = [column for column in source.columns if column not in rows.column_names]
    if absent:
        raise ValueError(f"{origin} has no column {absent[0]!r}, only {', '.join(rows.column_names)}")
    if rows.num_rows == 0:
        raise ValueError(f"{origin} is empty: expected at least one row of {', '.join(source.columns)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, rows.schema) as writer:
        writer.write_table(rows)
    part.replace(path)
    return int(rows.num_rows)


def _from_folder(folder: Path, split: Split) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    parquet, jsonl = folder / f"{split}.parquet", folder / f"{split}.jsonl"
    if parquet.is_file():
        try:
            return pq.read_table(parquet)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{parquet} is not a parquet file that can be read: {error}") from None
    if not jsonl.is_file():
        raise ValueError(f"neither {parquet} nor {jsonl.name} is there")
    rows = []
    with jsonl.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                raise ValueError(f"{jsonl}, line {number}: expected one JSON object a line ({why})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{jsonl}, line {number}: expected one JSON object a line")
            rows.append(row)
    try:
        return pa.Table.from_pylist(rows)
    except pa.ArrowException as error:
        raise ValueError(f"{jsonl}: a field has not the same type in all lines ({error})") from None
