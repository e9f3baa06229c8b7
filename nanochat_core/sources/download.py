"""Downloading over plain HTTP: several files at once, resumed, retried, checked, whole or not at all."""

import json
import os
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from nanochat_core.artifacts.store import sha256, sync_directory, write_whole
from nanochat_core.sources.http import Remote, RetryableError, Stopped, Vouched, attempt
from nanochat_core.sources.retry import PATIENCE, Patience, Tell, Wait

Progress = Callable[[int, int, str], object]  # files that are here, files wanted, what is waited for if so

CORRUPT = 3  # complete, but not what its hash says
PROGRESS = 1 << 16  # bytes that an attempt has to bring for patience to begin anew


class Fetched(NamedTuple):
    """A file that is here; kept beside it as `<name>.sum`, so that a second run asks for nothing."""

    path: Path
    size: int
    sha256: str
    revision: str | None = None  # the commit that the hub says it is of


def offline() -> bool:
    """Whether the user wants no network to be used."""
    return os.environ.get("NANOCHAT_OFFLINE", "0") not in ("", "0")


def here(remote: Remote) -> Fetched | None:
    """The file if it is there and is what was once written down about it.

    A file without a note was brought by hand: what the caller knows of it is checked, then it gets a note.
    """
    if not remote.path.is_file():
        return None
    note = _beside(remote.path, ".sum")
    noted = json.loads(note.read_text()) if note.is_file() else {}
    size = remote.path.stat().st_size
    found = Fetched(remote.path, size, sha256(remote.path), noted.get("revision"))
    sizes, hashes = {remote.size, noted.get("size")}, {remote.sha256, noted.get("sha256")}
    if not (sizes <= {None, found.size} and hashes <= {None, found.sha256}):
        return None
    if remote.commit is not None and found.revision not in (None, remote.commit):
        return None
    if not noted:
        _write_note(remote, found)
    return found


def fetch(
    files: Sequence[Remote],
    *,
    workers: int = 4,
    offline: bool = False,
    timeout: float = 30.0,
    patience: float = PATIENCE,
    wait: Wait | None = None,
    progress: Progress = lambda done, wanted, waiting: None,
) -> list[Fetched]:
    """Bring all files, in the order given. The first one that cannot be had ends it; what arrived stays."""
    stop = threading.Event()
    found: dict[Path, Fetched] = {}

    def tell(waiting: str) -> None:
        progress(len(found), len(files), waiting)

    def bring(remote: Remote) -> Fetched:
        there = here(remote)
        if there is None and offline:
            raise ValueError(_to_bring(remote))
        return there or fetch_one(
            remote, timeout=timeout, patience=patience, wait=wait or stop.wait, stop=stop, tell=tell
        )

    with ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = [pool.submit(bring, remote) for remote in files]
        try:
            for job in as_completed(jobs):
                fetched = job.result()
                found[fetched.path] = fetched
                progress(len(found), len(files), "")
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[remote.path] for remote in files]


def fetch_one(
    remote: Remote,
    *,
    timeout: float = 30.0,
    patience: float = PATIENCE,
    wait: Wait = time.sleep,
    stop: threading.Event | None = None,
    tell: Tell = lambda waiting: None,
) -> Fetched:
    """Bring one file, going on where an earlier attempt (or process) stopped.

    `patience` is how many seconds in a row may bring nothing.
    """
    stop = stop or threading.Event()
    remote.path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(remote.path, ".part")
    left = Patience(remote.url, patience, wait, tell)
    damaged = 0
    mark = _size(part)
    while True:
        if stop.is_set():
            raise Stopped
        try:
            vouched = attempt(remote, part, timeout, stop)
            if (wrong := _wrong(remote, part, vouched)) is None:
                break
            part.unlink()
            damaged, mark = damaged + 1, 0
            if damaged == CORRUPT:
                raise ValueError(f"{remote.url} arrived damaged {CORRUPT} times: {wrong}{remote.other}")
            again = RetryableError(wrong)
        except RetryableError as error:
            again = error
        if (size := _size(part)) >= mark + PROGRESS:
            mark = size
            left.renew()
        if not left.pause(again):
            raise ValueError(
                f"{remote.url} could not be fetched; nothing came in {patience / 60:.0f} min: {again}; "
                f"the same command goes on, or bring it by hand to {remote.path}"
            )
    fetched = Fetched(remote.path, _size(part), sha256(part), vouched.commit)
    _write_note(remote, fetched)
    part.replace(remote.path)
    sync_directory(part.parent)
    _beside(part, ".etag").unlink(missing_ok=True)
    return fetched


def _to_bring(remote: Remote) -> str:
    """What a user without a network is told of a file that is not here, or is another one."""
    if not remote.path.is_file():
        return (
            f"NANOCHAT_OFFLINE is set and {remote.path.name} is not here: "
            f"bring {remote.url} by hand to {remote.path}"
        )
    expected = f", expected {remote.sha256}" if remote.sha256 else ""
    return (
        f"NANOCHAT_OFFLINE is set and {remote.path} is another file than {remote.url}: its sha256 is "
        f"{sha256(remote.path)}{expected}; bring that one by hand{remote.other}"
    )


def _wrong(remote: Remote, part: Path, vouched: Vouched) -> str | None:
    """What a complete file has that it should not; None if it is the one that is meant."""
    size, digest = _size(part), sha256(part)
    wanted = remote.sha256 or vouched.sha256
    if remote.size not in (None, size):
        return f"expected {remote.size} bytes, {size} came"
    return f"expected sha256 {wanted}, {digest} came" if wanted not in (None, digest) else None


def _write_note(remote: Remote, fetched: Fetched) -> None:
    note = {
        "url": remote.url,
        "size": fetched.size,
        "sha256": fetched.sha256,
        "revision": fetched.revision,
    }
    write_whole(_beside(remote.path, ".sum"), json.dumps(note))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def unzip(archive: Path, folder: Path) -> None:
    """Unpack, file by file and each whole; an entry that would land outside the folder is an error."""
    try:
        with zipfile.ZipFile(archive) as files:
            for entry in files.infolist():
                target = folder / entry.filename
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive} holds {entry.filename}, which leads out of the folder")
                if not entry.is_dir() and not entry.filename.startswith("__MACOSX"):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(target, files.read(entry))  # checks the entry's CRC
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive} is damaged ({error}): delete it and run again") from None
