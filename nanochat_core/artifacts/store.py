"""Artefact directories: written whole or not at all, listed with sizes and hashes, verified before they are
believed.

A directory with a `result.json` that verifies is the cache; one without is where to resume.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FORMAT = 1  # of job.json and result.json
PRIVATE = {
    "job.json",
    "result.json",
    "attempts.jsonl",
    "machine.jsonl",
    "log.txt",
}  # of a job's directory, but not of its artefact
SCRATCH = ("checkpoints", "partial")  # what an attempt leaves for the next one; gone once the stage is done
AUDITS = "audits"  # checkpoints kept for `nanochat audit`, no part of the artefact
OF_THE_RUN = {"metrics.jsonl", "transcript.jsonl"}  # times and hosts, so no part of what an artefact holds


class Damaged(ValueError):
    """An artefact is not what its manifest says; the message names the file and what is wrong with it."""


class Newer(ValueError):
    """An artefact was written by a later version of this program."""


def write_whole(path: Path, data: bytes | str, *, sync: bool = True) -> None:
    """Write a file so that a reader, or a power cut, never sees half of it. Without `sync` a power cut may
    undo the rename until somebody syncs the directory."""
    # Several processes, and threads of one, may write the same record at once.
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    with part.open("wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)
    if sync:
        sync_directory(path.parent)


def write_json(path: Path, value: Any, *, sync: bool = True) -> None:
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n", sync=sync)


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def artefact_files(directory: Path) -> list[Path]:
    """The files of an artefact, relative to its directory: all but our own records and scratch."""
    found = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        scratch = (
            relative.parts[0] in (*SCRATCH, AUDITS) or str(relative) in PRIVATE or path.name.endswith(".part")
        )
        if path.is_file() and not scratch:
            found.append(relative)
    return found


def entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def commit(
    directory: Path,
    base_dir: Path,
    metrics: dict[str, Any],
    shared: set[Path],
    seconds: float,
    inputs: Mapping[str, Any],
    rerun: str | None,
    origins: Mapping[str, Any],
) -> None:
    """Declare a directory finished: hash everything, write result.json last, then drop the scratch."""
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} came out as {value}, which no result can hold")
    files = {str(name): entry(directory / name) for name in artefact_files(directory)}
    for name in files:  # the hashes are of what the disk holds, not only of what the page cache does
        with (directory / name).open("rb") as f:
            os.fsync(f.fileno())
    result = {
        "format": FORMAT,
        "metrics": metrics,
        "files": files,
        "shared": {str(path.relative_to(base_dir)): entry(path) for path in sorted(shared)},
        "origins": origins,
        "inputs": inputs,
        "rerun": rerun,
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(directory / "result.json", result | {"seal": seal(result)})
    for name in SCRATCH:
        shutil.rmtree(directory / name, ignore_errors=True)


def read_result(directory: Path) -> dict[str, Any] | None:
    """What result.json says, or None if the stage has not finished. A damaged or newer record is an error."""
    path = directory / "result.json"
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise Damaged("result.json cannot be read") from None
    if not isinstance(result, dict) or not {"format", "metrics", "files", "inputs"} <= set(result):
        raise Damaged("result.json is not a result of ours")
    if result["format"] > FORMAT:
        raise Newer(
            f"{path} was written by a newer nanochat (format {result['format']}; this one reads {FORMAT}): "
            "update nanochat, or use another --base-dir"
        )
    return result


def verify(directory: Path, base_dir: Path, *, hashes: bool = False) -> dict[str, Any] | None:
    """The result of a finished directory whose files are all there at their full size (and, on request, with
    their hashes); None if it has not finished; Damaged, with the file and the reason, if it cannot be
    believed."""
    result = read_result(directory)
    if result is None:
        return None
    listed = [(directory / name, name, want) for name, want in result["files"].items()]
    listed += [(base_dir / name, name, want) for name, want in result.get("shared", {}).items()]
    for path, name, want in listed:
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise Damaged(f"{name} is missing") from None
        if size != want["size"]:
            raise Damaged(f"{name} has {size:,} bytes, not {want['size']:,}")
    for place, was in result.get("origins", {}).items():
        if (name := changed_origin(Path(place), was)) is not None:
            raise Damaged(f"{name}, which it was made from, has changed")
    if hashes:
        if result.get("seal", seal(result)) != seal(result):
            raise Damaged("result.json has changed (its seal is another)")
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            for (_, name, want), digest in zip(listed, pool.map(_digest, listed), strict=True):
                if digest != want["sha256"]:
                    raise Damaged(f"{name} has changed (its hash is another)")
    return result


def origin(place: Path, suffixes: Sequence[str] = ("",)) -> dict[str, Any]:
    """A user's own file, or the files of a folder that end so: what they are now, to notice a change by."""
    files = {}
    for path in _origin_files(place, suffixes):
        stat = path.stat()
        files[str(path)] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}
    return {"suffixes": list(suffixes), "files": files}


def changed_origin(place: Path, was: Mapping[str, Any]) -> Path | None:
    """The first file that is new, gone or another. A touched one is hashed; a place that is not there at all
    has not changed, so that a disk may be taken out."""
    if not place.exists():
        return None
    now = _origin_files(place, was["suffixes"])
    for name in sorted({str(path) for path in now} ^ set(was["files"])):
        return Path(name)
    for path in now:
        want, stat = was["files"][str(path)], path.stat()
        same = stat.st_size == want["size"] and (
            stat.st_mtime_ns == want["mtime_ns"] or sha256(path) == want["sha256"]
        )
        if not same:
            return path
    return None


def _origin_files(place: Path, suffixes: Sequence[str]) -> list[Path]:
    found = place.rglob("*") if place.is_dir() else [place]
    return sorted(path for path in found if path.name.endswith(tuple(suffixes)) and path.is_file())


def seal(result: Mapping[str, Any]) -> str:
    """A digest of a result's own record: its numbers are in no other file whose hash would tell."""
    rest = {key: value for key, value in result.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _digest(file: tuple[Path, str, Any]) -> str | None:
    try:
        return sha256(file[0])
    except FileNotFoundError:  # it went while we read the others
        return None


def withdraw(directory: Path, why: str) -> None:
    """Take back a result that cannot be believed any more: its stage is to be made again, right there."""
    (directory / "result.json").unlink(missing_ok=True)
    if directory.exists():
        note_attempt(directory, "damaged", why=why)


def note_attempt(directory: Path, event: str, **more: Any) -> None:
    """One line in the directory's own history: when attempts began and how they ended."""
    with (directory / "attempts.jsonl").open("a") as f:
        f.write(json.dumps({"event": event, "time": round(time.time(), 3), **more}) + "\n")


def content(result: Mapping[str, Any]) -> str:
    """A digest of what an artefact holds, so that what was made from it can tell whether it is still the
    same.

    The progress log and the transcript are left out: they carry times.
    """
    hashes = {name: want["sha256"] for name, want in result["files"].items() if name not in OF_THE_RUN}
    hashes |= {name: want["sha256"] for name, want in result.get("shared", {}).items()}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:20]


def code_digest() -> str:
    """A digest of this library's source, so that an artefact can say it was made by other code."""
    h = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        h.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()[:20]


def read_attempts(directory: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (directory / "attempts.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def seconds_spent(attempts: list[dict[str, Any]]) -> float:
    """The working time of all attempts: one that was killed ends with its last sign of life."""
    spent, started = 0.0, None
    for event in attempts:
        if started is not None:
            end = event["previous_end"] if event["event"] == "started" else event["time"]
            spent += max(0.0, end - started)
        started = event["time"] if event["event"] == "started" else None
    return spent


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True, keep: bool = False) -> Iterator[bool]:
    """Hold a lock that the kernel drops with its holder, however that dies; with `keep` it survives exec.

    Yields whether it is held: always, unless it is taken and we do not wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        os.set_inheritable(f.fileno(), keep)
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
