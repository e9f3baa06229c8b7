"""One request for one file: what is asked, what the answer vouches for, and which failures may pass."""

import contextlib
import email.utils
import http.client
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO, NamedTuple, NoReturn
from urllib.parse import urlsplit

from nanochat_core.machine.proxy import opener

CHUNK = 1 << 20
SLOWEST = 1 << 10  # bytes a second over a whole timeout: below that a line counts as dead
HTTP_TRANSIENT = {408, 425, 429, 500, 502, 503, 504, *range(520, 528)}  # the last ones are Cloudflare's
NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
HASH = re.compile(r"[0-9a-f]{64}")
HEADERS = {"User-Agent": "nanochat", "Accept-Encoding": "identity"}
UNKNOWN = "check the name, the revision and your access"


class Remote(NamedTuple):
    """A file to fetch, and what is known of it beforehand."""

    url: str
    path: Path
    size: int | None = None
    sha256: str | None = None
    commit: str | None = None  # of the data set on the hub: a file of another one is refused
    absent: str = UNKNOWN  # what to do if the server does not have it
    other: str = ""  # what to do if it is there and has another hash


class Vouched(NamedTuple):
    """What the hub says that a file is; another server's word is not taken for a hash."""

    sha256: str | None
    commit: str | None


class Stopped(Exception):
    """Another file could not be had, or the user ended it: what is under way is left where it is."""


class RetryableError(Exception):
    """This attempt failed and another may succeed; `after` is what the server asked for, in seconds."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


def endpoint() -> str:
    """Where the Hugging Face hub is; HF_ENDPOINT names a mirror of it, as for its own library."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def on_hub(url: str) -> bool:
    return urlsplit(url)[:2] == urlsplit(endpoint())[:2]


def authorize(request: urllib.request.Request) -> None:
    """Show the hub, and nobody else, the user's token: a redirect to another host goes on without it."""
    if on_hub(request.full_url):
        from huggingface_hub import get_token  # HF_TOKEN, or what `hf auth login` has stored

        if token := get_token():
            request.add_unredirected_header("Authorization", f"Bearer {token}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and remembers the hash and commit that the hub names only in the first answer."""

    def __init__(self, *, leave_host: bool = True) -> None:
        self.leave_host = leave_host
        self.followed = False
        self.linked: str | None = None
        self.commit: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if not self.leave_host and urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            return None
        self.followed = True
        self.linked = self.linked or headers.get("X-Linked-ETag")
        self.commit = self.commit or headers.get("X-Repo-Commit")
        new = super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
        if new is not None:
            new.method = req.get_method()  # Python before 3.13 makes a GET of every HEAD
            authorize(new)
        return new


def attempt(remote: Remote, part: Path, timeout: float, stop: threading.Event) -> Vouched:
    """Append to `part` until the body is complete.

    Beside it lies what it was begun of: `sha256:...` as the hub named it, or the server's strong ETag. The
    first needs no condition when going on, for the hash of the whole is compared in the end.
    """
    tag_file = part.with_name(part.name + ".etag")
    have = part.stat().st_size if part.exists() else 0
    tag = tag_file.read_text(encoding="utf-8") if tag_file.exists() else ""
    begun = tag.removeprefix("sha256:") if tag.startswith("sha256:") else None
    headers = dict(HEADERS)
    if have and (begun or remote.sha256):
        headers["Range"] = f"bytes={have}-"
    elif have and tag:  # without a tag nobody can say whether the rest belongs to the same file
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    request = urllib.request.Request(remote.url, headers=headers)
    authorize(request)
    redirects = _Redirects()
    try:
        with opener(request.full_url, redirects).open(request, timeout=timeout) as answer:
            linked = _as_hash(redirects.linked or answer.headers.get("X-Linked-ETag"))
            commit = redirects.commit or answer.headers.get("X-Repo-Commit")
            _insist_on(remote, commit)
            resumed = answer.status == 206
            if resumed and _range_start(answer.headers) != have:
                part.unlink()
                raise RetryableError("the server sent another range than asked for")
            if resumed and begun and linked and begun != linked:
                part.unlink()
                raise RetryableError("the file has changed since its download began")
            if not resumed:
                etag = answer.headers.get("ETag") or ""
                strong = "" if etag.startswith("W/") else etag
                tag_file.write_text(f"sha256:{linked}" if linked else strong, encoding="utf-8")
            length = answer.headers.get("Content-Length")
            got = _receive(answer, part, resumed, timeout, stop)
            if length is not None and got != int(length):
                raise RetryableError(f"the connection ended after {got} of {length} bytes")
            return Vouched(linked or (begun if resumed else None), commit)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # the rest begins past the end: complete, or not the same file
            if (error.headers.get("Content-Range") or "").endswith(f"/{have}"):
                return Vouched(_as_hash(redirects.linked) or begun, redirects.commit)
            part.unlink()
            raise RetryableError("the partial file does not fit what the server has") from None
        _refuse(error, request, remote.absent, redirects.followed)
    except NETWORK as error:
        raise RetryableError(_reason(error)) from None


def head(url: str, timeout: float, absent: str = UNKNOWN) -> Message:
    """The headers of the first answer, on this host, that is more than a new address on it."""
    request = urllib.request.Request(url, headers=HEADERS, method="HEAD")
    authorize(request)
    redirects = _Redirects(leave_host=False)
    try:
        with opener(request.full_url, redirects).open(request, timeout=timeout) as answer:
            headers: Message = answer.headers
            return headers
    except urllib.error.HTTPError as error:
        error.close()
        if 300 <= error.code < 400:  # to where the content lies: that is not what is asked for here
            return error.headers
        _refuse(error, request, absent, redirected=False)
    except NETWORK as error:
        raise RetryableError(_reason(error)) from None


def _receive(
    answer: http.client.HTTPResponse, part: Path, resumed: bool, timeout: float, stop: threading.Event
) -> int:
    """Write the body as it comes; how many bytes. A line that all but stands still is given up."""
    got = had = 0
    since = time.monotonic()
    with part.open("ab" if resumed else "wb") as file:
        while chunk := answer.read1(CHUNK):  # what is there: nothing is held back from the disk
            file.write(chunk)
            got += len(chunk)
            if stop.is_set():
                raise Stopped
            if (now := time.monotonic()) - since > timeout:
                if got - had < SLOWEST * timeout:
                    raise RetryableError(f"{got - had} bytes came in {now - since:.1f} s")
                since, had = now, got
        file.flush()
        os.fsync(file.fileno())
    return got


def _insist_on(remote: Remote, commit: str | None) -> None:
    if remote.commit and commit and commit != remote.commit:
        raise ValueError(
            f"{remote.url} came of commit {commit} and not of {remote.commit}: whatever answers for "
            f"{urlsplit(remote.url).netloc} is not to be trusted; try another network or mirror"
        )


def _refuse(
    error: urllib.error.HTTPError, request: urllib.request.Request, absent: str, redirected: bool
) -> NoReturn:
    """What an error status means: to be tried again, or a sentence."""
    if error.code in HTTP_TRANSIENT:
        raise RetryableError(f"HTTP {error.code}", retry_after(error.headers)) from None
    if error.code == 403 and redirected:
        raise RetryableError("HTTP 403 from where it was sent on to; such links expire") from None
    if error.code in (401, 403) and on_hub(request.full_url):
        absent = (
            "the token (HF_TOKEN, or that of `hf auth login`) is refused or has no access: renew it, or "
            "ask for access on the data set's page"
            if request.has_header("Authorization")
            else "there is no such data set, or it is not for everybody: set HF_TOKEN or run `hf auth login`"
        )
    raise ValueError(f"{request.full_url} answers HTTP {error.code}: {absent}") from None


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", "") or error) or type(error).__name__


def _as_hash(etag: str | None) -> str | None:
    value = (etag or "").strip().strip('"')
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
