"""Where pretraining text comes from: the embedded corpus, the hub, URLs, or a local folder.

Whatever the source, the result is parquet files with a string column `text`, the last one for validation.
"""

import bisect
import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from nanochat_core.artifacts.store import locked, sha256, sync_directory, write_whole
from nanochat_core.sources import corpus
from nanochat_core.sources.documents import MANIFEST, Shard, Shards, row_group, shard_list
from nanochat_core.sources.download import Progress, fetch
from nanochat_core.sources.http import Remote
from nanochat_core.sources.hub import HUB
from nanochat_core.sources.raw_text import (
    DOCUMENT,
    TextFile,
    check_column,
    find,
    kind,
    pieces,
    read_documents,
)

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP = 256  # documents; ranks take turns at row groups, so even a small shard has four
EMBEDDED_TRAIN = 4  # shards of about 5.2 MB of text each
SMALL = 5_000_000  # characters of a corpus that goes without docstrings
HELD_OUT = 0.02  # of the embedded corpus's characters, whole documents
READERS = 4  # shards looked at at once; each takes a row group's memory
LOCAL_SHARD = 50_000_000  # characters of a shard made from local jsonl or txt files


# ----------------------------------------------------------------------------------------- parquet in and out


def write_shard(path: Path, texts: "Sequence[str] | pa.ChunkedArray", group: int = ROW_GROUP) -> None:
    """One shard, written whole: zstd, row groups of so many documents or of a quarter of the shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = max(1, min(group, len(texts) // 4))
    part = path.with_name(path.name + ".part")
    column = texts.cast(pa.string()) if isinstance(texts, pa.ChunkedArray) else pa.array(texts, pa.string())
    table = pa.table({"text": column})
    with part.open("wb") as file:
        pq.write_table(table, file, row_group_size=rows, compression="zstd", compression_level=3)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_directory(path.parent)


def describe(path: Path) -> Shard:
    """What there is to know of a parquet shard; a ValueError says why one cannot be trained on.

    All of its text is looked at once, a row group at a time: 1.3 s for 250 million characters.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, listed, row_groups = file.schema_arrow, file.metadata.num_rows, file.num_row_groups
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {error}") from None
    check_column(str(path), schema, "text")
    if listed == 0:
        raise ValueError(f"{path} is empty: expected at least one document")
    rows = 0
    for index in range(row_groups):
        try:
            rows += len(row_group(path, index))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, row group {index}: a text is not UTF-8 ({error.reason}): convert the file first"
            ) from None
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}, row group {index}, cannot be read: {error}") from None
    if rows == 0:
        raise ValueError(f"{path} holds no text: all {listed} rows of column 'text' are null or blank")
    return Shard(path.name, path, path.stat().st_size, sha256(path), rows, row_groups)


def described(paths: Sequence[Path]) -> Shards:
    """Train shards and the last one, for validation; several are looked at at once."""
    with ThreadPoolExecutor(READERS) as pool:
        shards = tuple(pool.map(describe, paths))
    return Shards(shards[:-1], shards[-1:])


def manifest(shards: Shards, root: Path, commit: str | None = None) -> str:
    """shards.json, with paths relative to the downloads folder; a user's own files keep their full path.

    `commit` is that of the hub's data set, if they are of one.
    """

    def entry(shard: Shard) -> dict[str, str | int]:
        inside = shard.path.is_relative_to(root)
        path = shard.path.relative_to(root) if inside else shard.path.absolute()
        return shard._asdict() | {"path": str(path)}

    listing: dict[str, Any] = {} if commit is None else {"revision": commit}
    listing |= {split: [entry(shard) for shard in getattr(shards, split)] for split in Shards._fields}
    return json.dumps(listing, indent=1) + "\n"


def _complete(folder: Path, root: Path) -> Shards | None:
    """The shards of a folder that was finished and whose files still have their hashes."""
    if not (folder / MANIFEST).is_file():
        return None
    shards = shard_list(folder, root)
    whole = all(s.path.is_file() and sha256(s.path) == s.sha256 for s in shards.train + shards.validation)
    return shards if whole else None


def _fill(folder: Path, root: Path, make: Callable[[], Iterator[tuple[str, Sequence[str]]]]) -> Shards:
    """Make a folder of shards, unless it is there; the last shard that comes is the validation shard."""
    with locked(folder.with_name(folder.name + ".lock")):
        found = _complete(folder, root)
        if found is not None:
            return found
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for name, texts in make():
            write_shard(folder / name, texts)
            made.append(describe(folder / name))
        shards = Shards(tuple(made[:-1]), tuple(made[-1:]))
        write_whole(folder / MANIFEST, manifest(shards, root))
        return shards


# --------------------------------------------------------------------------------------------------- embedded


def embedded(root: Path, max_chars: int | None = None) -> Shards:
    """The embedded corpus: four train shards, one for validation, in a folder named by their origin."""
    decided = corpus.versions() | {
        "max_chars": str(max_chars),
        "shape": f"{ROW_GROUP}/{DOCUMENT}/{EMBEDDED_TRAIN}",
    }
    name = f"embedded-{hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:12]}"

    def make() -> Iterator[tuple[str, Sequence[str]]]:
        texts = list(corpus.documents(small=max_chars is not None and max_chars <= SMALL))
        train, held_out = split_documents(texts, max_chars)
        bounds = [round(i * len(train) / EMBEDDED_TRAIN) for i in range(EMBEDDED_TRAIN + 1)]
        for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
            yield f"train_{i:03d}.parquet", train[begin:end]
        yield "validation.parquet", held_out

    return _fill(root / name, root, make)


def split_documents(texts: list[str], max_chars: int | None) -> tuple[list[str], list[str]]:
    """Shuffle, hold out whole documents, then cut the long ones: no document has a piece on both sides."""
    rng = random.Random("embedded")
    rng.shuffle(texts)
    ends = list(itertools.accumulate(map(len, texts)))
    total = min(max_chars or ends[-1], ends[-1])
    n_held_out = bisect.bisect_left(ends, HELD_OUT * total) + 1
    n = max(n_held_out + EMBEDDED_TRAIN, bisect.bisect_left(ends, total) + 1)
    held_out = [piece for text in texts[:n_held_out] for piece in pieces(text)]
    train = [piece for text in texts[n_held_out:n] for piece in pieces(text)]
    rng.shuffle(train)
    return train, held_out


# ----------------------------------------------------------------------------------------- hub, URLs, folders


def download(
    files: Sequence[Remote],
    root: Path,
    *,
    workers: int,
    offline: bool,
    patience: float,
    progress: Progress = lambda done, wanted, waiting: None,
) -> Shards:
    """Parquet files, the last one for validation. Files that lie together there lie together here."""
    with locked(root / f"{folder_of(files[0].url)}.lock"):
        fetched = fetch(files, workers=workers, offline=offline, patience=patience, progress=progress)
    return described([file.path for file in fetched])


def revision(files: Sequence[Remote]) -> str | None:
    """The commit that files of the hub are of, as it said when they came; None if it said nothing, or if
    they are of several data sets. Two commits of one are an error: files repeat in them, and move."""
    found: dict[str, dict[str, Path]] = {}
    for file in files:
        note = file.path.with_name(f"{file.path.name}.sum")
        commit = json.loads(note.read_text()).get("revision") if note.is_file() else None
        if commit is not None:
            place = file.url.partition("/resolve/")[0] if "/resolve/" in file.url else folder_of(file.url)
            found.setdefault(place, {})[commit] = file.path
    for place, commits in found.items():
        if len(commits) > 1:
            each = "; ".join(f"{path} of {commit}" for commit, path in sorted(commits.items()))
            raise ValueError(
                f"the files of {place} are of {len(commits)} commits ({each}): name one in each URL, "
                "/resolve/COMMIT/, or delete the older files and run again"
            )
    return next(iter(*found.values())) if len(found) == 1 else None


def remotes(urls: Sequence[str], root: Path) -> list[Remote]:
    """Where the files of a download are kept."""
    if len(urls) < 2:
        raise ValueError("one URL is not enough: the last file is kept for validation, so list at least two")
    files = [Remote(url, root / folder_of(url) / url.split("?")[0].rsplit("/", 1)[1]) for url in urls]
    if len({file.path for file in files}) < len(urls):
        raise ValueError("a URL is listed twice: the validation file must not be trained on")
    return files


def from_filesystem(
    urls: Sequence[str], root: Path, count: int | None, *, workers: int, offline: bool
) -> Shards:
    """Folders or files on any file system that fsspec knows (s3://, gs://, ...), copied here."""
    url = ", ".join(urls)
    if offline:
        raise ValueError(f"NANOCHAT_OFFLINE is set: copy the files of {url} to a folder and name that")
    files = [file for each in urls for file in find(each)]
    parquet = [file for file in files if kind(file.url) == ".parquet"]
    if not files:
        raise ValueError(f"{url} holds no .parquet, .jsonl or .txt file")
    if len(parquet) == 1:
        raise ValueError(f"{url} holds one parquet file: the last is for validation, so two are needed")
    wanted = [*parquet[:-1][:count], parquet[-1]] if parquet else files
    folder = root / folder_of(f"{url.rstrip('/')}/")
    if len({file.url for file in files}) < len(files):
        raise ValueError(f"{url}: a file is named twice: the validation file must not be trained on")
    above = os.path.commonpath([PurePosixPath(file.url).parent for file in wanted])
    paths = [folder / PurePosixPath(file.url).relative_to(above) for file in wanted]
    with locked(folder.with_name(folder.name + ".lock")), ThreadPoolExecutor(workers) as pool:
        list(pool.map(_copy, wanted, paths))
    if not parquet:
        return _texts(folder, paths, root)
    return described(paths)


def _copy(file: TextFile, path: Path) -> None:
    """Copy a file whole, unless it is what is here; the file system's own library does the retries."""
    import fsspec  # type: ignore[import-untyped]

    note = path.with_name(path.name + ".sum")
    noted = json.loads(note.read_text()) if note.is_file() and path.is_file() else {}
    if noted.get("tag") == file.tag and noted["sha256"] == sha256(path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with fsspec.open(file.url, "rb") as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise ValueError(f"{file.url} could not be copied ({error}); the same command goes on") from None
    if part.stat().st_size != file.size:
        raise ValueError(f"{file.url} arrived with {part.stat().st_size} bytes, not {file.size}; run again")
    write_whole(note, json.dumps({"url": file.url, "tag": file.tag, "sha256": sha256(part)}))
    part.replace(path)
    sync_directory(path.parent)


def folder_of(url: str) -> str:
    """The name of the folder that a URL's neighbours are kept in: readable, and of its own for each place."""
    place = url.split("?")[0].rpartition("/")[0]
    readable = re.sub(r"[^\w.]+", "-", place.partition("://")[2])[-60:].strip("-")
    return f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def hub_files(name: str, count: int, commit: str, root: Path) -> list[Remote]:
    """The first `count` shards and then the pinned validation shard, all of one commit."""
    known = HUB[name]
    if not 1 <= count < known.shards:
        raise ValueError(
            f"{name} has {known.shards - 1} train shards; count = {count} is not among 1..{known.shards - 1}"
        )
    files = remotes([known.url(index, commit) for index in (*range(count), known.shards - 1)], root)
    absent = (
        f"it has no such file in commit {commit[:12]}: "
        "--set shards_head.revision=main --set shards.revision=main takes what it has now"
    )
    return [file._replace(commit=commit, absent=absent) for file in files]


def local(folder: Path, root: Path) -> Shards:
    """A folder of parquet files, used where they lie, the last by name for validation;
    or of jsonl and txt files, made into shards, every fiftieth document for validation."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is neither a folder, nor a URL, nor one of: embedded, {', '.join(HUB)}")
    if (folder / "partial").exists():
        raise ValueError(f"{folder} is not complete: run the `nanochat repackage` that fills it again")
    files = sorted(path for path in folder.rglob("*") if kind(path.name) and path.is_file())
    parquet = [path for path in files if path.suffix == ".parquet"]
    if len(parquet) == 1:
        raise ValueError(
            f"{parquet[0]} is the only parquet file: the last one is for validation, so two are needed; "
            f"make shards of it with: nanochat repackage {parquet[0]} FOLDER"
        )
    if not files:
        raise ValueError(f"{folder} holds no .parquet, .jsonl or .txt file")
    if not parquet:
        return _texts(folder, files, root)
    return described(parquet)


def _texts(folder: Path, files: Sequence[Path], root: Path) -> Shards:
    """Shards of jsonl and txt files, in a folder named by what the files hold."""
    listing = [(str(path.relative_to(folder)), sha256(path)) for path in files]
    name = f"local-{hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:12]}"
    return _fill(root / name, root, lambda: _from_files(files))


def _from_files(files: Sequence[Path]) -> Iterator[tuple[str, Sequence[str]]]:
    train: list[str] = []
    held_out: list[str] = []
    chars = made = 0
    for i, text in enumerate(text for path in files for text in read_documents(str(path))):
        if i % 50 == 0:
            held_out.append(text)
            continue
        train.append(text)
        chars += len(text)
        if chars >= LOCAL_SHARD:
            yield f"train_{made:05d}.parquet", train
            train, chars, made = [], 0, made + 1
    if not held_out or not (train or made):
        raise ValueError(f"{files[0].parent} holds fewer than two documents: nothing is left to train on")
    if train:
        yield f"train_{made:05d}.parquet", train
    yield "validation.parquet", held_out
