"""Any text into shards to pretrain on: shuffled as a whole, 250 million characters each, the last one apart.

A document's place in the shuffled order is a hash of the seed and its number, so shuffling is sorting. It is
an external sort: runs that fit into memory are sorted and written (`sort`), then merged into shards, a range
of hashes at a time (`write`). What comes out depends on the text and the seed alone, not on where a run ended
or on how often the work was killed.
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nanochat_core.artifacts.store import locked, sync_directory, write_json
from nanochat_core.sources.documents import MANIFEST, Shard, Shards, shard_list
from nanochat_core.sources.download import offline
from nanochat_core.sources.hub import COMMIT
from nanochat_core.sources.hub_rows import newest
from nanochat_core.sources.raw_text import FileReader, HubReader, Reader, TextFile, find
from nanochat_core.sources.shard_sets import describe, manifest, write_shard

BUCKETS = 1024  # ranges of hashes: a part of the text this small is merged in memory at a time
VALIDATION = 0.02  # of the characters, but never more than one shard
ROW_GROUP = 1024
PARTIAL = "partial"  # in the folder to be filled, until it is complete
PLAN, RUN, STATE = "plan.json", "run_{:05d}.arrow", "written.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Wanted:
    """What decides the shards."""

    source: str  # a file, folder, glob, fsspec URL, or OWNER/NAME of the hub
    column: str = "text"
    config: str | None = None  # these three of a data set on the hub
    split: str = "train"
    revision: str | None = None
    seed: int = 42
    shard_chars: int = 250_000_000

    def __post_init__(self) -> None:
        if self.shard_chars < 1 or self.seed < 0:
            raise ValueError("shard_chars is at least 1 and the seed at least 0")


class RepackageProgress(NamedTuple):
    """How far the work is."""

    phase: str  # "sorting" or "writing"
    documents: int
    chars: int
    fraction: float | None  # of the phase; None where the end is not known


Tell = Callable[[RepackageProgress], object]


def repackage(wanted: Wanted, out: Path, tell: Tell = lambda step: None) -> Shards:
    """Fill the folder `out` with shards, going on where an attempt that was killed stopped."""
    with at_work(out):
        sort(wanted, out, tell)
        return write(wanted, out, tell)


@contextlib.contextmanager
def at_work(out: Path) -> Iterator[None]:
    """Hold a folder, so that nobody else fills it at the same time."""
    out = out.absolute()
    with locked(out.with_name(f".{out.name}.lock"), wait=False) as held:
        if not held:
            raise ValueError(f"another process is filling {out}; wait for it")
        yield


def finished(out: Path) -> dict[str, Any] | None:
    """What the shards of a complete folder were made from."""
    if not (out / MANIFEST).is_file():
        return None
    found: dict[str, Any] | None = json.loads((out / MANIFEST).read_text(encoding="utf-8")).get("made_from")
    return found


# ------------------------------------------------------------------------------------------------ the source


def source_of(wanted: Wanted) -> list[TextFile] | None:
    """The files to read; None for a data set of the hub."""
    text = wanted.source
    local = Path(text).expanduser()
    if offline() and not local.exists():
        raise ValueError(f"NANOCHAT_OFFLINE is set and {text} is not here: bring its files to a folder")
    if "://" not in text and not local.exists() and not any(c in text for c in "*?["):
        if HUB_NAME.fullmatch(text):
            return None
        raise ValueError(f"{text} is neither a file or folder here, nor a URL, nor OWNER/NAME of the hub")
    files = find(text if "://" in text else str(local))
    if not files:
        raise ValueError(
            f"{text} holds no .parquet, .jsonl or .txt file (the last two also as .gz, .bz2, .xz)"
        )
    return files


def reader(wanted: Wanted, files: list[TextFile] | None, commit: str | None, place: Any) -> Reader:
    if files is not None:
        return FileReader(files, wanted.column, place)
    return HubReader(wanted.source, wanted.config, wanted.split, commit, wanted.column, place)


def commit_of(wanted: Wanted) -> str:
    """The commit of the hub's data set that is meant at this moment."""
    if wanted.revision is not None and COMMIT.fullmatch(wanted.revision):
        return wanted.revision
    return newest(wanted.source, wanted.revision)


def _same(kept: dict[str, Any] | None, plan: dict[str, Any]) -> bool:
    """Whether a kept plan is this one: the commit in it was decided when the work began, and stays."""
    return kept is not None and {key: kept[key] for key in kept if key != "commit"} == plan


# --------------------------------------------------------------------------------------------------- sorting


def sort(wanted: Wanted, out: Path, tell: Tell = lambda step: None) -> None:
    """Read every document and leave sorted runs in `out/partial`; at once if that has been done."""
    files = source_of(wanted)
    plan = asdict(wanted) | {"files": None if files is None else [list(file) for file in files]}
    before = finished(out)
    if _same(before, plan):
        return
    if before is not None or (not (out / PARTIAL).exists() and out.is_dir() and any(out.iterdir())):
        raise ValueError(
            f"{out} already holds {'shards made from something else' if before else 'other files'}: "
            "name another folder, or empty it"
        )
    folder = out / PARTIAL
    kept = _read(folder / PLAN)
    if not _same(kept, plan):  # another text or seed: what is there is of no use
        kept = plan | {"commit": commit_of(wanted) if files is None else None}
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(folder / PLAN, kept)
    runs = _runs(folder)
    head = _head(runs[-1]) if runs else {"documents": 0, "chars": 0, "place": None, "last": False}
    if head["last"]:
        return
    source = reader(wanted, files, kept["commit"], head["place"])
    for done in _sorted_runs(wanted, source, folder, len(runs), head):
        tell(RepackageProgress("sorting", done["documents"], done["chars"], source.fraction()))


def _sorted_runs(
    wanted: Wanted, source: Reader, folder: Path, number: int, head: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Write one run after another; yields what each says of itself."""
    documents, chars = head["documents"], head["chars"]
    seed = wanted.seed.to_bytes(16, "little")
    texts: list[str] = []
    keys: list[int] = []
    size = 0

    def run(last: bool) -> dict[str, Any]:
        head = {"documents": documents, "chars": chars, "place": source.place(), "last": last}
        _write_run(folder / RUN.format(number), keys, texts, head)
        return head

    for text in source:
        key = hashlib.blake2b(documents.to_bytes(8, "little"), digest_size=8, key=seed).digest()
        texts.append(text)
        keys.append(int.from_bytes(key, "little"))
        documents, chars, size = documents + 1, chars + len(text), size + len(text)
        if size >= wanted.shard_chars:
            yield run(False)
            texts, keys, size, number = [], [], 0, number + 1
    yield run(True)


def _write_run(path: Path, keys: list[int], texts: list[str], head: dict[str, Any]) -> None:
    """A batch for each range of hashes, in order; documents with one hash keep their order."""
    import numpy as np
    import pyarrow as pa

    numbers = np.array(keys, dtype=np.uint64)
    order = np.argsort(numbers, kind="stable")
    numbers = numbers[order]
    schema = pa.schema(
        [("key", pa.uint64()), ("text", pa.large_string())], metadata={"head": json.dumps(head)}
    )
    taken = pa.array(texts, pa.large_string()).take(order)
    ends = np.searchsorted(numbers, np.arange(1, BUCKETS, dtype=np.uint64) * np.uint64(2**64 // BUCKETS))
    part = path.with_name(path.name + ".part")
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.OSFile(str(part), "wb") as file, pa.ipc.new_file(file, schema, options=options) as writer:
        begin = 0
        for end in [*ends.tolist(), len(texts)]:
            rows = [pa.array(numbers[begin:end]), taken.slice(begin, end - begin)]
            writer.write_batch(pa.record_batch(rows, schema=schema))
            begin = end
    part.replace(path)
    sync_directory(path.parent)


def _runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("run_*.arrow"))


def _head(run: Path) -> dict[str, Any]:
    import pyarrow as pa

    with pa.OSFile(str(run)) as file:
        head: dict[str, Any] = json.loads(pa.ipc.open_file(file).schema.metadata[b"head"])
    return head


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# --------------------------------------------------------------------------------------------------- writing


class _Place(NamedTuple):
    """Where in the sorted text the next shard begins, and what lies before it."""

    bucket: int
    row: int
    documents: int
    chars: int


def write(wanted: Wanted, out: Path, tell: Tell = lambda step: None) -> Shards:
    """Merge the runs into shards, each whole or not there; at once if that has been done."""
    folder = out / PARTIAL
    if (out / MANIFEST).exists():  # it is written last; runs beside it are what a killed clearing has left
        shutil.rmtree(folder, ignore_errors=True)
        return _listed(out)
    runs = _runs(folder)
    head = _head(runs[-1])
    if head["documents"] < 2:
        raise ValueError(
            f"{wanted.source} has {head['documents']} documents with text: one to train on and one for "
            "validation are needed"
        )
    state = _read(folder / STATE) or {"shards": [], "place": [0, 0, 0, 0]}
    made = [Shard(**entry | {"path": out / entry["name"]}) for entry in state["shards"]]
    for shard, place in _merged(wanted, out, runs, head, len(made), _Place(*state["place"])):
        made.append(shard)
        entries = [shard._asdict() | {"path": shard.name} for shard in made]
        write_json(folder / STATE, {"shards": entries, "place": list(place)})
        tell(RepackageProgress("writing", place.documents, place.chars, place.chars / head["chars"]))
    shards = Shards(tuple(made[:-1]), tuple(made[-1:]))
    listing = json.loads(manifest(shards, out)) | {"made_from": _read(folder / PLAN)}
    write_json(out / MANIFEST, listing)
    shutil.rmtree(folder)
    return shards


def _listed(out: Path) -> Shards:
    shards = shard_list(out, out)
    for shard in shards.train + shards.validation:
        if not shard.path.is_file() or shard.path.stat().st_size != shard.size:
            raise ValueError(f"{shard.path} is missing or changed: empty {out} and run again")
    return shards


def _merged(
    wanted: Wanted, out: Path, runs: list[Path], head: dict[str, Any], number: int, place: _Place
) -> Iterator[tuple[Shard, _Place]]:
    """Each shard once it is written, from `number` on, and where the next one begins.

    The training text is shared out evenly: a document goes where its first character falls.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    held_out = min(wanted.shard_chars, max(1, round(VALIDATION * head["chars"])))
    train = max(1, head["chars"] - held_out)
    count = -(-train // wanted.shard_chars)
    together = min(
        BUCKETS, max(1, BUCKETS * wanted.shard_chars // (4 * head["chars"]))
    )  # a quarter of a shard
    waiting: list[Any] = []
    current = 0
    first, row, documents, chars = place

    def shard() -> Shard:
        path = out / f"shard_{number:05d}.parquet"
        write_shard(path, pa.chunked_array(waiting, pa.large_string()), ROW_GROUP)
        return describe(path)

    for bucket in range(first, BUCKETS, together):
        texts = _sorted(runs, range(bucket, min(bucket + together, BUCKETS))).slice(row)
        lengths = pc.utf8_length(texts).to_numpy().astype(np.int64)
        before = chars + np.cumsum(lengths) - lengths
        owner = np.minimum(before * count // train, count)
        if len(texts) and documents + len(texts) == head["documents"]:
            owner[-1] = count  # there is always something to validate on
        cuts = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(texts)]
        for begin, end in itertools.pairwise(cuts):
            if begin == end:
                continue
            if waiting and owner[begin] != current:
                yield shard(), _Place(bucket, row + begin, documents + begin, int(before[begin]))
                waiting, number = [], number + 1
            current = owner[begin]
            waiting.append(texts.slice(begin, end - begin))
        documents, chars, row = documents + len(texts), chars + int(lengths.sum()), 0
    if waiting:
        yield shard(), _Place(BUCKETS, 0, documents, chars)


def _sorted(runs: list[Path], buckets: range) -> Any:
    """The texts of a range of hashes, in order; runs are opened one at a time, there may be thousands."""
    import numpy as np
    import pyarrow as pa

    batches = []
    for run in runs:
        with pa.OSFile(str(run)) as file:
            found = pa.ipc.open_file(file)
            batches += [found.get_batch(bucket) for bucket in buckets]
    table = pa.Table.from_batches(batches)
    order = np.argsort(table.column("key").to_numpy(), kind="stable")
    return table.column("text").take(order).combine_chunks()
