"""Documents out of files as users have them: parquet, jsonl and txt, here or on any file system fsspec knows.

A file that cannot be read so is named, with the line where there are lines and with what was expected.
"""

import json
import lzma
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanochat_core.sources.hub_rows import words

DOCUMENT = 4_000  # characters: longer ones are cut at a line end, so that a batch sees many documents
BLOCK = 1 << 20  # characters of a txt file at a time
BATCH = 1024  # rows of a parquet file at a time
SUFFIXES = (".parquet", ".jsonl", ".txt")
PACKED = (".gz", ".bz2", ".xz", ".zst")  # of jsonl and txt


class TextFile(NamedTuple):
    """A file to read documents from; the tag changes when the file does."""

    url: str
    size: int
    tag: str


def kind(name: str) -> str | None:
    """.parquet, .jsonl or .txt, compressed or not; None for what is not read."""
    path = Path(name.lower())
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in SUFFIXES and (suffix != ".parquet" or path.suffix == suffix) else None


def find(place: str) -> list[TextFile]:
    """The files of a folder with all that is below it, of a glob, or the one file named; in order of name."""
    import fsspec  # type: ignore[import-untyped]

    try:
        fs, path = fsspec.core.url_to_fs(place)
        names = fs.glob(path) if any(c in path for c in "*?[") else fs.find(path)
        listed = sorted(name for name in names if kind(name) and fs.isfile(name))
        return [_described(fs, name) for name in listed]
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(f"{place} cannot be listed: {error}") from None


def _described(fs: Any, name: str) -> TextFile:
    info = fs.info(name)
    here = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    tag = info["mtime"] if here else info.get("ETag") or fs.ukey(name)
    return TextFile(name if here else fs.unstrip_protocol(name), int(info["size"]), str(tag))


def read_documents(name: str, column: str = "text") -> Iterator[str]:
    """The documents of a file: strings of a parquet column, a field of each jsonl line, pieces of a txt file.

    Those that are empty, or null in parquet, are left out.
    """
    import fsspec

    suffix = kind(name)
    if suffix is None:
        raise ValueError(f"{name} is none of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            with fsspec.open(name, "rb") as file:
                yield from _parquet(name, file, column)
        else:
            with fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer") as lines:
                yield from pieces_of(lines) if suffix == ".txt" else _jsonl(name, lines, column)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}, line {not_utf8(name)}, is not UTF-8 ({error.reason}): convert the file first"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:  # a packed file that is cut short, too
        raise ValueError(f"{name} cannot be read: {error}") from None


def _parquet(name: str, file: IO[bytes], column: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as rows:
            check_column(name, rows.schema_arrow, column)
            for number, batch in enumerate(rows.iter_batches(batch_size=BATCH, columns=[column])):
                try:
                    texts = batch.column(0).to_pylist()
                except UnicodeDecodeError as error:
                    where = f"rows {number * BATCH + 1} to {number * BATCH + batch.num_rows}"
                    raise ValueError(
                        f"{name}, {where}: a text is not UTF-8 ({error.reason}): convert the file first"
                    ) from None
                yield from (text for text in texts if text and not text.isspace())
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is not a parquet file that can be read: {error}") from None


def check_column(name: str, schema: Any, column: str) -> None:
    """Refuse a table without a column of strings by that name."""
    import pyarrow as pa

    if column not in schema.names:
        raise ValueError(
            f"{name} has no column {column!r} (it has {', '.join(schema.names)}): "
            "name the column of the text so"
        )
    found = schema.field(column).type
    if found not in (pa.string(), pa.large_string(), pa.string_view()):
        raise ValueError(f"{name}: column {column!r} holds {found}, expected strings")


def _jsonl(name: str, lines: IO[str], column: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            raise ValueError(f"{name}, line {number}: expected an object with a string field {column!r}")
        if row[column].strip():
            yield row[column]


def not_utf8(name: str) -> int | None:
    """The first line that is not UTF-8, if there is one."""
    import fsspec

    with fsspec.open(name, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def pieces(text: str, limit: int = DOCUMENT) -> Iterator[str]:
    """Cut at the last line end before the limit, or at a space, or wherever there is neither."""
    while len(text) > limit:
        piece, text = _cut(text, limit)
        yield piece
    if text:
        yield text


def pieces_of(file: IO[str], limit: int = DOCUMENT) -> Iterator[str]:
    """A file's pieces without having all of it in memory."""
    text = ""
    while block := file.read(BLOCK):
        text = (text + block).lstrip()
        while len(text) > limit:
            piece, text = _cut(text, limit)
            if piece:
                yield piece
    if text.rstrip():
        yield text.rstrip()


def _cut(text: str, limit: int) -> tuple[str, str]:
    ends = (text.rfind("\n", limit // 2, limit), text.rfind(" ", limit // 2, limit), limit)
    cut = next(end for end in ends if end > 0)
    return text[:cut].rstrip(), text[cut:].lstrip()


class FileReader:
    """The documents of many files, from a place on; `place` is where to go on after the last one given."""

    def __init__(self, files: list[TextFile], column: str, place: list[int] | None) -> None:
        self.files, self.column = files, column
        self.file, self.row = place or (0, 0)

    def __iter__(self) -> Iterator[str]:
        while self.file < len(self.files):
            for text in islice(read_documents(self.files[self.file].url, self.column), self.row, None):
                self.row += 1
                yield text
            self.file, self.row = self.file + 1, 0

    def place(self) -> list[int]:
        return [self.file, self.row]

    def fraction(self) -> float | None:
        """How much has been read, in whole files."""
        return self.file / len(self.files)


class HubReader:
    """The documents of a data set on the Hugging Face hub, streamed: it takes no disk."""

    def __init__(
        self, name: str, config: str | None, split: str, revision: str | None, column: str, place: Any
    ) -> None:
        from datasets import load_dataset

        self.name, self.column = name, column
        try:
            rows = load_dataset(name, config, split=split, revision=revision, streaming=True)
            names = rows.column_names or list(next(iter(rows), {}))
        except Exception as error:  # its own, those of two HTTP libraries, pyarrow's, fsspec's
            raise ValueError(
                f"{name} ({split}) could not be had from the hub ({words(error)}): check its name, "
                "config and split, or try again"
            ) from error
        if column not in names:
            raise ValueError(f"{name} has no column {column!r} (it has {', '.join(names)}): name the text's")
        self.rows = rows.select_columns([column])
        if place is not None:
            self.rows.load_state_dict(place)

    def __iter__(self) -> Iterator[str]:
        for number, row in enumerate(self._rows(), 1):
            text = row[self.column]
            if text is not None and not isinstance(text, str):
                raise ValueError(
                    f"{self.name}, row {number}: column {self.column!r} holds {type(text).__name__}, "
                    "expected strings"
                )
            if text and not text.isspace():
                yield text

    def _rows(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.rows
        except Exception as error:  # after all of the library's own retries
            raise ValueError(f"{self.name} broke off ({words(error)}); the same command goes on") from error

    def place(self) -> Any:
        return self.rows.state_dict()

    def fraction(self) -> float | None:
        return None


Reader = FileReader | HubReader
