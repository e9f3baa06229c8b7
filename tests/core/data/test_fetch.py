"""The downloader against a server that does everything a bad line does."""

import hashlib
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.sources.download import fetch, fetch_one, unzip
from nanochat_core.sources.http import Remote

BODY = {f"shard_{i}": hashlib.sha256(str(i).encode()).digest() * (1500 + 37 * i) for i in range(20)}
TAG = {name: hashlib.sha256(body).hexdigest() for name, body in BODY.items()}
# A strong ETag of 64 hex digits that is not the content's hash: raw.githubusercontent.com sends such.
ETAG = {name: hashlib.sha256(f"etag of {name}".encode()).hexdigest() for name in BODY}


class Hostile(BaseHTTPRequestHandler):
    """Serves BODY with ranges; `trouble` may answer in its own way, by file and attempt."""

    trouble: Callable[["Hostile", str, int], bool]
    seen: dict[str, int]
    asked: list[str]
    lock = threading.Lock()
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/")
        with self.lock:
            self.seen[name] = attempt = self.seen.get(name, 0) + 1
            self.asked.append(f"{name} {self.headers.get('Range', '')}")
        if not type(self).trouble(self, name, attempt):
            self.serve(name)

    def serve(
        self,
        name: str,
        *,
        cut: int | None = None,
        flip: bool = False,
        ranges: bool = True,
        linked: str | None = None,
        etag: str | None = None,
    ) -> None:
        """`linked` and `etag` are what these headers say; empty for none."""
        body = BODY[name]
        linked, etag = TAG[name] if linked is None else linked, ETAG[name] if etag is None else etag
        begin = int(self.headers["Range"][6:-1]) if ranges and "Range" in self.headers else 0
        if begin >= len(body):
            self.empty(416, {"Content-Range": f"bytes */{len(body)}"})
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        for header, value in (("ETag", etag), ("X-Linked-ETag", linked)):
            if value:
                self.send_header(header, f'"{value}"')
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        sent = body[begin:] if cut is None else body[begin : begin + cut]
        self.wfile.write(bytes([sent[0] ^ 1]) + sent[1:] if flip else sent)
        if cut is not None:
            self.close_connection = True

    def empty(self, code: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()


Trouble = Callable[[Hostile, str, int], bool]


class Site:
    def __init__(self, url: str, handler: type[Hostile]) -> None:
        self.url = url
        self.handler = handler

    def remote(self, name: str, folder: Path, **known: Any) -> Remote:
        return Remote(f"{self.url}/{name}", folder / name, **known)


@pytest.fixture
def site() -> Iterator[Site]:
    handler = type(
        "Handler", (Hostile,), {"seen": {}, "asked": [], "trouble": lambda self, name, attempt: False}
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}", handler)
    server.shutdown()
    server.server_close()
    thread.join()


def no_wait(seconds: float) -> None:
    pass


def test_twenty_shards_arrive_byte_correct_through_every_kind_of_trouble(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        kind = int(name.split("_")[1]) % 7
        if attempt > 2 or kind == 6:
            return False
        match kind:
            case 0:
                self.empty(500)
            case 1:
                self.empty(429, {"Retry-After": "0"})
            case 2:
                self.serve(name, cut=1000)
            case 3:
                self.serve(name, flip=True)
            case 4:
                self.close_connection = True  # nothing at all
            case 5 if attempt == 1:
                self.empty(302, {"Location": f"/{name}", "X-Linked-ETag": f'"{TAG[name]}"'})
            case _:
                return False
        return True

    site.handler.trouble = trouble
    remotes = [site.remote(name, tmp_path) for name in BODY]
    fetched = fetch(remotes, wait=no_wait, timeout=5)
    assert [file.sha256 for file in fetched] == list(TAG.values())
    assert all((tmp_path / name).read_bytes() == body for name, body in BODY.items())
    assert not list(tmp_path.glob("*.part*"))
    site.handler.asked.clear()
    assert fetch(remotes, wait=no_wait) == fetched
    assert site.handler.asked == []  # a second run asks for nothing


def test_a_cut_download_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if attempt == 1:
            self.serve(name, cut=10_000)
        return attempt == 1

    site.handler.trouble = trouble
    fetch_one(site.remote("shard_3", tmp_path), wait=no_wait)
    assert site.handler.asked == ["shard_3 ", "shard_3 bytes=10000-"]


def test_a_killed_process_leaves_a_part_that_the_next_one_uses(site: Site, tmp_path: Path) -> None:
    (tmp_path / "shard_3.part").write_bytes(BODY["shard_3"][:5000])
    (tmp_path / "shard_3.part.etag").write_text(f'"{TAG["shard_3"]}"')
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]
    assert site.handler.asked == ["shard_3 bytes=5000-"]


def test_a_complete_part_is_not_fetched_again(site: Site, tmp_path: Path) -> None:
    (tmp_path / "shard_3.part").write_bytes(BODY["shard_3"])
    (tmp_path / "shard_3.part.etag").write_text(f'"{TAG["shard_3"]}"')
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]


def test_a_server_without_ranges_is_read_from_the_beginning(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        self.serve(name, cut=10_000 if attempt == 1 else None, ranges=False)
        return True

    site.handler.trouble = trouble
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]


def test_an_etag_that_looks_like_a_hash_is_not_taken_for_one(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        self.serve(name, linked="", cut=10_000 if attempt == 1 else None)
        return True

    site.handler.trouble = trouble
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]
    assert site.handler.asked == ["shard_3 ", "shard_3 bytes=10000-"]  # it serves for If-Range


def test_the_hubs_hash_is_believed_over_that_of_where_it_redirects_to(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if self.path.startswith("/cdn/"):
            self.serve(name.removeprefix("cdn/"), linked="0" * 64)
        else:
            self.empty(302, {"Location": f"/cdn/{name}", "X-Linked-ETag": f'"{TAG[name]}"'})
        return True

    site.handler.trouble = trouble
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]
    with pytest.raises(ValueError, match=f"expected sha256 {'f' * 64}, {TAG['shard_3']} came; see below"):
        known = site.remote("shard_3", tmp_path / "known", sha256="f" * 64, other="; see below")
        fetch_one(known, wait=no_wait)


def test_a_cut_download_goes_on_by_the_hubs_hash_where_the_other_server_has_no_etag(
    site: Site, tmp_path: Path
) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if self.path.startswith("/cdn/"):
            assert "If-Range" not in self.headers
            self.serve(name.removeprefix("cdn/"), cut=20_000, linked="", etag="")
        else:
            self.empty(302, {"Location": f"/cdn/{name}", "X-Linked-ETag": f'"{TAG[name]}"'})
        return True

    site.handler.trouble = trouble
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]
    ranges = [line.split(" ")[1] for line in site.handler.asked if line.startswith("cdn/")]
    assert ranges == ["", "bytes=20000-", "bytes=40000-"]


def test_a_part_of_a_file_that_has_changed_since_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    (tmp_path / "shard_3.part").write_bytes(b"older" * 1000)
    (tmp_path / "shard_3.part.etag").write_text(f"sha256:{'0' * 64}")
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]
    assert site.handler.asked == ["shard_3 bytes=5000-", "shard_3 "]


def test_retry_after_is_obeyed_and_other_waits_grow(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if attempt == 1:
            self.empty(429, {"Retry-After": "17"})
        elif attempt < 4:
            self.empty(503)
        return attempt < 4

    site.handler.trouble = trouble
    waits: list[float] = []
    fetch_one(site.remote("shard_1", tmp_path), wait=waits.append)
    assert waits[0] == 17
    assert 2 <= waits[1] <= 4 <= waits[2] <= 8


def test_a_link_that_has_expired_is_asked_for_again_at_the_first_address(site: Site, tmp_path: Path) -> None:
    links: list[str] = []

    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if self.path == "/link/2":
            self.serve("shard_3")
        elif self.path.startswith("/link/"):
            self.empty(403)
        else:
            links.append(name)
            self.empty(302, {"Location": f"/link/{len(links)}"})
        return True

    site.handler.trouble = trouble
    assert fetch_one(site.remote("shard_3", tmp_path), wait=no_wait).sha256 == TAG["shard_3"]
    assert links == ["shard_3"] * 2


def test_the_network_may_be_away_for_long_and_what_is_waited_for_is_said(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))
    real, tries = urllib.request.OpenerDirector.open, iter(range(25))

    def open_or_fail(*args: Any, **options: Any) -> Any:
        if next(tries, None) is not None:
            raise away
        return real(*args, **options)

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", open_or_fail)
    waits: list[float] = []
    said: list[str] = []
    fetch_one(site.remote("shard_3", tmp_path), wait=waits.append, tell=said.append)
    assert len(waits) == 25 and max(waits) <= 60 and sum(waits) > 600
    assert "waiting for the network: 127.0.0.1:" in said[0] and "Name or service not known" in said[0]
    assert "next try in" in said[0] and "given up in 45 min" in said[0]


def test_a_server_that_asks_for_an_hour_gets_what_patience_there_is(site: Site, tmp_path: Path) -> None:
    site.handler.trouble = lambda self, name, attempt: self.empty(503, {"Retry-After": "3600"}) or True  # type: ignore[func-returns-value]
    waits: list[float] = []
    with pytest.raises(ValueError, match=r"nothing came in 45 min: HTTP 503"):
        fetch_one(site.remote("shard_3", tmp_path), wait=waits.append)
    assert waits == [pytest.approx(45 * 60, abs=5)]


@pytest.mark.parametrize(
    ("trouble", "said", "attempts"),
    [
        (lambda self, name, attempt: self.empty(404) or True, "HTTP 404", 1),
        (lambda self, name, attempt: self.empty(401) or True, "HTTP 401", 1),
        (lambda self, name, attempt: self.empty(403) or True, "HTTP 403", 1),
        (lambda self, name, attempt: self.empty(500) or True, "HTTP 500.*or bring it by hand to", 7),
        (lambda self, name, attempt: self.serve(name, flip=True) or True, "damaged 3 times", 3),
    ],
)
def test_what_cannot_be_had_fails_loudly_within_the_budget(
    site: Site, tmp_path: Path, trouble: Trouble, said: str, attempts: int
) -> None:
    site.handler.trouble = trouble
    with pytest.raises(ValueError, match=said):
        fetch([site.remote("shard_2", tmp_path)], wait=no_wait, patience=60)
    assert site.handler.seen["shard_2"] == attempts
    assert not (tmp_path / "shard_2").exists()


def test_the_first_failure_ends_the_others_at_once(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if name == "shard_0":
            time.sleep(0.1)
        self.empty(404 if name == "shard_0" else 503, {"Retry-After": "60"})
        return True

    site.handler.trouble = trouble
    started = time.perf_counter()
    with pytest.raises(ValueError, match="shard_0 answers HTTP 404"):
        fetch([site.remote(name, tmp_path) for name in BODY], workers=2)
    assert time.perf_counter() - started < 5


def test_a_stalled_connection_is_given_up_and_tried_again(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if attempt == 1:
            time.sleep(0.4)
            self.close_connection = True
        return attempt == 1

    site.handler.trouble = trouble
    assert fetch_one(site.remote("shard_2", tmp_path), wait=no_wait, timeout=0.1).sha256 == TAG["shard_2"]


def test_a_line_that_drips_counts_as_dead_and_ends_within_the_budget(site: Site, tmp_path: Path) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        body = BODY[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Linked-ETag", f'"{TAG[name]}"')
        self.end_headers()
        try:
            for i in range(100):
                self.wfile.write(body[i : i + 1])
                time.sleep(0.01)
        except OSError:
            pass  # we were hung up on
        self.close_connection = True
        return True

    site.handler.trouble = trouble
    with pytest.raises(ValueError, match=r"nothing came in 1 min: \d+ bytes came in"):
        fetch([site.remote("shard_2", tmp_path)], wait=no_wait, patience=60, timeout=0.15)
    assert 4 < site.handler.seen["shard_2"] < 10


@pytest.mark.parametrize("stated", [-100, 100])
def test_a_wrong_length_never_passes_for_the_file(site: Site, tmp_path: Path, stated: int) -> None:
    def trouble(self: Hostile, name: str, attempt: int) -> bool:
        if attempt > 1:
            return False
        body = BODY[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + stated))
        self.send_header("X-Linked-ETag", f'"{TAG[name]}"')
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True
        return True

    site.handler.trouble = trouble
    assert fetch([site.remote("shard_2", tmp_path)], wait=no_wait, timeout=2)[0].sha256 == TAG["shard_2"]
    assert (tmp_path / "shard_2").read_bytes() == BODY["shard_2"]


COMMAND = """
import sys
from pathlib import Path
from nanochat_core.sources.download import Remote, fetch
fetch([Remote(f"{sys.argv[1]}/shard_{i}", Path(sys.argv[2]) / f"shard_{i}") for i in range(20)], workers=4)
"""


def test_kill_9_in_the_middle_loses_at_most_the_open_chunks(site: Site, tmp_path: Path) -> None:
    sent: dict[str, int] = {}

    def slowly(self: Hostile, name: str, attempt: int) -> bool:
        body = BODY[name]
        begin = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.send_header("X-Linked-ETag", f'"{TAG[name]}"')
        self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        try:
            for at in range(begin, len(body), 4096):
                self.wfile.write(body[at : at + 4096])
                with self.lock:
                    sent[name] = sent.get(name, 0) + len(body[at : at + 4096])
                time.sleep(0.003)
        except OSError:
            self.close_connection = True  # its process was killed
        return True

    site.handler.trouble = slowly
    command = [sys.executable, "-c", COMMAND, site.url, str(tmp_path)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("shard_*[0-9]"))) < 6:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.002)
        process.kill()
    time.sleep(0.05)  # the server notices
    here = {path.name for path in tmp_path.glob("shard_*[0-9]")}
    parts = {
        path.stem: path.stat().st_size
        for path in tmp_path.glob("shard_*[0-9].part")
        if ".sum" not in path.name
    }
    assert 6 <= len(here) < 20 and parts and len(parts) <= 4
    site.handler.asked.clear()
    fetched = fetch([site.remote(name, tmp_path) for name in BODY], wait=no_wait)
    assert [file.sha256 for file in fetched] == list(TAG.values())
    asked = dict(line.split(" ", 1) for line in site.handler.asked)
    assert not here & set(asked)
    for name, size in parts.items():
        assert asked[name] == (f"bytes={size}-" if size else "")
    again = sum(sent.values()) - sum(len(body) for body in BODY.values())
    assert again < 4 * (1 << 16)  # what was on the way to four open files


def test_a_file_with_another_hash_than_the_known_one_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="damaged"):
        fetch([site.remote("shard_2", tmp_path, sha256="0" * 64)], wait=no_wait)


def test_a_file_that_changed_on_disk_is_fetched_again(site: Site, tmp_path: Path) -> None:
    remote = site.remote("shard_2", tmp_path)
    fetch([remote])
    remote.path.write_bytes(b"x" * remote.path.stat().st_size)
    assert fetch([remote])[0].sha256 == TAG["shard_2"]
    assert site.handler.seen["shard_2"] == 2


def test_offline_says_what_to_bring_where_and_takes_what_was_brought(site: Site, tmp_path: Path) -> None:
    remote = site.remote("shard_2", tmp_path / "here")
    with pytest.raises(ValueError, match=r"NANOCHAT_OFFLINE.*shard_2 by hand to .*here/shard_2"):
        fetch([remote], offline=True)
    remote.path.parent.mkdir(exist_ok=True)
    remote.path.write_bytes(BODY["shard_2"])
    assert fetch([remote], offline=True)[0].sha256 == TAG["shard_2"]
    with pytest.raises(
        ValueError, match=f"is another file .* is {TAG['shard_2']}, expected {'f' * 64}; bring"
    ):
        fetch([remote._replace(sha256="f" * 64)], offline=True)
    assert site.handler.asked == []


def test_an_archive_that_is_damaged_or_leads_out_is_refused(tmp_path: Path) -> None:
    import zipfile

    bad = tmp_path / "bad.zip"
    bad.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="damaged"):
        unzip(bad, tmp_path / "out")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("../escaped.txt", "x")
    with pytest.raises(ValueError, match="leads out"):
        unzip(bad, tmp_path / "out")
    assert not (tmp_path / "escaped.txt").exists()
