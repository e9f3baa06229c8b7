"""Downloading over plain HTTP: several files at once, resumed, retried, checked, whole or not at all."""

import contextlib
import email.utils
import http.client
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.message import Message
from pathlib import Path
from typing import IO, NamedTuple

from nanochat_core.store import sha256, sync_directory, write_whole

Wait = Callable[[float], object]
Progress = Callable[[int, int], None]  # files that are here, files wanted

ATTEMPTS = 6  # in a row that brought next to nothing
CORRUPT = 3  # complete, but not what its hash says
LONGEST_WAIT = 300.0
CHUNK = 1 << 20
SLOWEST = 1 << 10  # bytes a second over a whole timeout: below that a line counts as dead
PROGRESS = 1 << 16  # bytes that an attempt has to bring for the count of failures to begin anew
HTTP_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
HASH = re.compile(r"[0-9a-f]{64}")


class Remote(NamedTuple):
    """A file to fetch, and what is known of it beforehand."""

    url: str
    path: Path
    size: int | None = None
    sha256: str | None = None


class Fetched(NamedTuple):
    """A file that is here; kept beside it as `<name>.sum`, so that a second run asks for nothing."""

    path: Path
    size: int
    sha256: str
    revision: str | None = None  # the commit that the hub says it is of


class Stopped(Exception):
    """Another file could not be had, or the user ended it: what is under way is left where it is."""


class _Again(Exception):
    """This attempt failed and another may succeed; `after` is what the server asked for, in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


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
    if not noted:
        _write_note(remote, found)
    return found


def fetch(
    files: Sequence[Remote],
    *,
    workers: int = 4,
    offline: bool = False,
    timeout: float = 30.0,
    wait: Wait | None = None,
    progress: Progress | None = None,
) -> list[Fetched]:
    """Bring all files, in the order given. The first one that cannot be had ends it; what arrived stays."""
    stop = threading.Event()

    def bring(remote: Remote) -> Fetched:
        found = here(remote)
        if found is None and offline:
            raise ValueError(
                f"NANOCHAT_OFFLINE is set and {remote.path.name} is not here: "
                f"bring {remote.url} by hand to {remote.path}"
            )
        return found or fetch_one(remote, timeout=timeout, wait=wait or stop.wait, stop=stop)

    found: dict[Path, Fetched] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        jobs = [pool.submit(bring, remote) for remote in files]
        try:
            for job in as_completed(jobs):
                fetched = job.result()
                found[fetched.path] = fetched
                if progress is not None:
                    progress(len(found), len(files))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [found[remote.path] for remote in files]


def fetch_one(
    remote: Remote, *, timeout: float = 30.0, wait: Wait = time.sleep, stop: threading.Event | None = None
) -> Fetched:
    """Bring one file, going on where an earlier attempt (or process) stopped."""
    stop = stop or threading.Event()
    remote.path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(remote.path, ".part")
    jitter = random.Random(remote.url)
    failures = corrupt = 0
    mark = part.stat().st_size if part.exists() else 0
    while True:
        if stop.is_set():
            raise Stopped
        try:
            expected, revision = _attempt(remote, part, timeout, stop)
            size, digest = part.stat().st_size, sha256(part)
            wanted = remote.sha256 or expected
            if (remote.size in (None, size)) and (wanted in (None, digest)):
                break
            part.unlink()
            corrupt += 1
            mark = 0
            reason = f"{size} bytes, sha256 {digest[:12]}; expected {remote.size}, {(wanted or '')[:12]}"
            if corrupt == CORRUPT:
                raise ValueError(f"{remote.url} arrived damaged {CORRUPT} times ({reason})")
            again = _Again(reason)
        except _Again as error:
            again = error
        size = part.stat().st_size if part.exists() else 0
        failures = failures + 1 if size < mark + PROGRESS else 0
        mark = mark if failures else size
        if failures == ATTEMPTS:
            raise ValueError(
                f"{remote.url} could not be fetched in {ATTEMPTS} attempts: {again}; the same command goes "
                f"on, or bring it by hand to {remote.path}"
            )
        wait(
            min(
                LONGEST_WAIT,
                again.after if again.after is not None else 2.0**failures * jitter.uniform(0.5, 1.0),
            )
        )
    fetched = Fetched(remote.path, size, digest, revision)
    _write_note(remote, fetched)
    part.replace(remote.path)
    sync_directory(part.parent)
    _beside(part, ".etag").unlink(missing_ok=True)
    return fetched


def _write_note(remote: Remote, fetched: Fetched) -> None:
    note = {
        "url": remote.url,
        "size": fetched.size,
        "sha256": fetched.sha256,
        "revision": fetched.revision,
    }
    write_whole(_beside(remote.path, ".sum"), json.dumps(note))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and remembers the hash and commit that the hub names only in the first answer."""

    def __init__(self) -> None:
        self.linked: str | None = None
        self.revision: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        self.linked = self.linked or headers.get("X-Linked-ETag")
        self.revision = self.revision or headers.get("X-Repo-Commit")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]


def _attempt(
    remote: Remote, part: Path, timeout: float, stop: threading.Event
) -> tuple[str | None, str | None]:
    """Append to `part` until the body is complete; what the server vouches for, as far as it does: the sha256
    and the commit."""
    tag_file = _beside(part, ".etag")
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text(encoding="utf-8") if tag_file.exists() else ""
    headers = {"User-Agent": "nanochat", "Accept-Encoding": "identity"}
    if have and tag:  # without a tag nobody can say whether the rest belongs to the same file
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
        with opener.open(urllib.request.Request(remote.url, headers=headers), timeout=timeout) as answer:
            vouched = (
                redirects.linked or answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
            )
            commit = answer.headers.get("X-Repo-Commit")
            resumed = answer.status == 206 and _range_start(answer.headers) == have
            if answer.status == 206 and not resumed:
                part.unlink()
                raise _Again("the server sent another range than asked for")
            if not resumed:
                etag = answer.headers.get("ETag") or ""
                tag_file.write_text("" if etag.startswith("W/") else etag, encoding="utf-8")
            length = answer.headers.get("Content-Length")
            got = 0
            with part.open("ab" if resumed else "wb") as file:
                since, had = time.monotonic(), 0
                while chunk := answer.read1(CHUNK):  # what is there: nothing is held back from the disk
                    file.write(chunk)
                    got += len(chunk)
                    if stop.is_set():
                        raise Stopped
                    if (now := time.monotonic()) - since > timeout:
                        if got - had < SLOWEST * timeout:
                            raise _Again(f"{got - had} bytes came in {now - since:.1f} s")
                        since, had = now, got
                file.flush()
                os.fsync(file.fileno())
            if length is not None and got != int(length):
                raise _Again(f"the connection ended after {got} of {length} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # the rest begins past the end: complete, or not the same file
            complete = (error.headers.get("Content-Range") or "").endswith(f"/{have}")
            if complete:
                return _as_hash(redirects.linked or tag), redirects.revision
            part.unlink()
            raise _Again("the partial file does not fit what the server has") from None
        if error.code in HTTP_TRANSIENT:
            raise _Again(f"HTTP {error.code}", retry_after(error.headers)) from None
        raise ValueError(
            f"{remote.url} answers HTTP {error.code}: check the name, the revision and your access"
        ) from None
    except NETWORK as error:
        raise _Again(str(error) or type(error).__name__) from None
    return _as_hash(vouched), redirects.revision or commit


def _as_hash(etag: str) -> str | None:
    value = etag.strip().strip('"')
    return value if HASH.fullmatch(value) else None


def _range_start(headers: Message) -> int | None:
    found = re.match(r"bytes (\d+)-", headers.get("Content-Range") or "")
    return int(found[1]) if found else None


def retry_after(headers: Message) -> float | None:
    """Seconds or a date, as RFC 9110 allows."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None


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
