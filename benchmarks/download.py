"""Time to bring shards from a server that is far and fails, ours beside two that download them otherwise.

    uv run python benchmarks/download.py [--files N] [--megabytes N] [--rounds N] [--json]

The server is local: each connection gets so many bytes a second, each answer comes after a delay, and a share
of the answers is an error 503 or a body that breaks off half way, chosen by file and attempt, the same for
everybody. The peers:

  one by one   nanochat's own way: file after file, each whole again after a failure, waits of 2^n seconds
  hub          huggingface_hub's `http_get` in as many threads as ours: it resumes a broken body by itself and
               retries 503 with waits of its own; what it raises in the end is tried again, the part kept

Every file is compared byte by byte. A ratio is the median over the rounds, in which the three take turns.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from nanochat_core.sources.download import fetch
from nanochat_core.sources.http import Remote

WORKERS = 4
ATTEMPTS = 12  # of the peers, for each file


class Server:
    """Serves files made of their number; `trouble` is the share of answers that fail."""

    def __init__(self, files: int, size: int, rate: float, delay: float, trouble: float) -> None:
        self.bodies = {
            f"/shard_{i}": hashlib.sha256(str(i).encode()).digest() * (size // 32) for i in range(files)
        }
        self.rate, self.delay, self.trouble = rate, delay, trouble
        self.attempts: dict[str, int] = {}
        self.sent = 0
        self.lock = threading.Lock()

    def fails(self, path: str, attempt: int) -> str | None:
        """The same failures for everybody: never more than two in a row of one file."""
        chance = hashlib.sha256(f"{path} {attempt}".encode()).digest()
        if attempt % 3 == 0 or chance[0] >= 256 * self.trouble:
            return None
        return "error" if chance[1] % 2 else "cut"


def handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            data = server.bodies[self.path]
            with server.lock:
                server.attempts[self.path] = attempt = server.attempts.get(self.path, 0) + 1
            time.sleep(server.delay)
            failure = server.fails(self.path, attempt)
            if failure == "error":
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            begin = int(self.headers["Range"][6:].split("-")[0]) if "Range" in self.headers else 0
            self.send_response(206 if "Range" in self.headers else 200)
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            end = begin + (len(data) - begin) // 2 if failure == "cut" else len(data)
            step = 1 << 16
            started = time.monotonic()
            try:
                for at in range(begin, end if body else begin, step):
                    self.wfile.write(data[at : min(at + step, end)])
                    with server.lock:
                        server.sent += min(step, end - at)
                    ahead = (at + step - begin) / server.rate - (time.monotonic() - started)
                    if ahead > 0:
                        time.sleep(ahead)
            except OSError:
                self.close_connection = True
            if failure == "cut":
                self.close_connection = True

    return Handler


@contextmanager
def serving(server: Server) -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def ours(url: str, names: list[str], folder: Path) -> None:
    remotes = [Remote(url + name, folder / name[1:]) for name in names]
    fetch(remotes, workers=WORKERS)


def one_by_one(url: str, names: list[str], folder: Path) -> None:
    """Whole files in turn, each again from its beginning after a failure."""
    for name in names:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(url + name, timeout=30) as answer:
                    part = folder / f"{name[1:]}.tmp"
                    with part.open("wb") as file:
                        while chunk := answer.read(1 << 20):
                            file.write(chunk)
                    if part.stat().st_size != int(answer.headers["Content-Length"]):
                        raise OSError("cut")
                part.rename(folder / name[1:])
                break
            except OSError:
                time.sleep(2.0**attempt)


def hub(url: str, names: list[str], folder: Path) -> None:
    """huggingface_hub's own download of a URL, in as many threads as ours."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()

    def bring(name: str) -> None:
        part = folder / f"{name[1:]}.incomplete"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with part.open("ab") as file:
                    http_get(url + name, file, resume_size=file.tell())
                part.rename(folder / name[1:])
                return
            except Exception:
                time.sleep(2.0**attempt)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(bring, names))


WAYS: dict[str, Callable[[str, list[str], Path], None]] = {
    "one by one": one_by_one,
    "hub": hub,
    "ours": ours,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=20)
    parser.add_argument("--megabytes", type=float, default=4.0, help="of a file")
    parser.add_argument("--rate", type=float, default=8.0, help="megabytes a second of one connection")
    parser.add_argument("--delay", type=float, default=0.1, help="seconds before each answer")
    parser.add_argument("--trouble", type=float, default=0.3, help="share of answers that fail")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    size = int(args.megabytes * 1e6) // 32 * 32
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    sent: dict[str, float] = {}
    right: dict[str, bool] = dict.fromkeys(WAYS, True)
    for _ in range(args.rounds):
        for way, bring in WAYS.items():
            server = Server(args.files, size, args.rate * 1e6, args.delay, args.trouble)
            with serving(server) as url, tempfile.TemporaryDirectory() as folder:
                started = time.monotonic()
                bring(url, list(server.bodies), Path(folder))
                seconds[way].append(time.monotonic() - started)
                found = {
                    f"/{p.name}": p.read_bytes() for p in Path(folder).iterdir() if p.name.count("_") == 1
                }
                right[way] &= all(found.get(name) == body for name, body in server.bodies.items())
                sent[way] = server.sent / (args.files * size)
    print(f"{args.files} files of {args.megabytes:g} MB, {args.trouble:.0%} of answers fail")
    print(f"{'':<12} {'seconds':>8} {'bytes sent':>11} {'ours is faster':>15}  all byte-correct")
    summary: dict[str, dict[str, float | bool]] = {}
    for way in WAYS:
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds["ours"], strict=True))
        taken = statistics.median(seconds[way])
        print(f"{way:<12} {taken:8.2f} {sent[way]:10.2f}x {ratio:14.2f}x  {'yes' if right[way] else 'NO'}")
        summary[way] = {"seconds": taken, "sent": sent[way], "ratio": ratio, "right": right[way]}
    if args.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
