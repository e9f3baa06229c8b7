"""A known data set of the hub: of one commit, decided once; the user's token for the hub alone."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.artifacts.stage import Job, Runtime
from nanochat_core.sources import hub
from nanochat_core.sources.documents import shard_list
from nanochat_core.sources.download import fetch_one
from nanochat_core.sources.http import Remote
from nanochat_core.sources.shard_sets import write_shard
from nanochat_core.stages import shards

OLD, NEW = "a" * 40, "b" * 40
NAME = "words"


class Answer(BaseHTTPRequestHandler):
    """The hub's redirects to another server, and that server; what was asked of both is kept."""

    hub: "Hub"
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = "cdn" if self.path.startswith("/cdn/") else "hub"
        self.hub.asked.append((place, self.command, self.path, self.headers.get("Authorization")))
        name = self.path.rsplit("/", 1)[1]
        if place == "cdn":
            body = (self.hub.folder / name).read_bytes()
            self.answer(200, {"Content-Length": str(len(body)), "ETag": '"elsewhere"'}, body)
            return
        revision = self.path.split("/resolve/")[1].split("/")[0]
        if self.hub.trouble:
            self.answer(self.hub.trouble.pop(0))
        elif revision not in ("main", OLD, NEW):
            self.answer(404)
        else:
            headers = {
                "Location": f"{self.hub.cdn}/cdn/{name}",
                "X-Repo-Commit": self.hub.says or (self.hub.main if revision == "main" else revision),
                "X-Linked-ETag": f'"{hashlib.sha256((self.hub.folder / name).read_bytes()).hexdigest()}"',
            }
            self.answer(302, headers)

    def answer(self, code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(code)
        for key, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


class Hub:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.main = OLD
        self.says: str | None = None  # another commit than the one that was asked for
        self.trouble: list[int] = []
        self.asked: list[tuple[str, str, str, str | None]] = []
        handler = type("Handler", (Answer,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self.servers)

    def paths(self, place: str) -> list[str]:
        return [path for where, _, path, _ in self.asked if where == place]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has one data set of two train shards and one for validation."""
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(3):
        write_shard(folder / f"shard_{i:05d}.parquet", [f"document {i}"])
    made = Hub(folder)
    threads = [threading.Thread(target=each.serve_forever, args=(0.01,)) for each in made.servers]
    for thread in threads:
        thread.start()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setitem(hub.HUB, NAME, hub.HubSet("owner/words", 3))
    yield made
    for server in made.servers:
        server.shutdown()
        server.server_close()
    for thread in threads:
        thread.join()


def job(base: Path, stage: str, cfg: Any, minutes: float = 45) -> Job:
    path = base / stage / "f"
    path.mkdir(parents=True, exist_ok=True)
    return Job(stage, cfg, {}, path, Runtime(base_dir=base, network_minutes=minutes), "f")


def test_a_branch_means_the_commit_that_it_had_at_first(site: Hub, tmp_path: Path) -> None:
    base = tmp_path / "base"
    head = shards.Config(source=NAME, count=1)
    first = job(base, "shards_head", head)
    assert shards.run(head, first)["revision"] == OLD
    assert site.asked[0][1:3] == ("HEAD", "/datasets/owner/words/resolve/main/shard_00002.parquet")
    assert f'"revision": "{OLD}"' in (first.path / "shards.json").read_text()
    site.main = NEW
    cfg = shards.Config(source=NAME, count=2)
    second = job(base, "shards", cfg)
    assert shards.run(cfg, second)["revision"] == OLD
    assert {path.split("/resolve/")[1] for path in site.paths("hub")[1:]} == {
        f"{OLD}/shard_{i:05d}.parquet" for i in range(3)
    }
    assert shard_list(second.path).train[0].path == shard_list(first.path).train[0].path
    moved = shards.Config(source=NAME, count=1, revision=NEW)
    assert shards.run(moved, job(base, "moved", moved))["revision"] == NEW


def test_a_known_commit_is_taken_without_asking(
    site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.HUB, NAME, hub.HubSet("owner/words", 3, NEW))
    cfg = shards.Config(source=NAME, count=1)
    assert shards.run(cfg, job(tmp_path / "base", "shards", cfg))["revision"] == NEW
    assert {command for _, command, _, _ in site.asked} == {"GET"}
    assert hub.COMMIT.fullmatch(hub.HUB["climbmix-400b-shuffle"].commit or "")


def test_a_file_of_another_commit_is_refused(site: Hub, tmp_path: Path) -> None:
    cfg = shards.Config(source=NAME, count=1, revision=OLD)
    site.says = NEW
    with pytest.raises(ValueError, match=f"came of commit {NEW} and not of {OLD}"):
        shards.run(cfg, job(tmp_path / "base", "shards", cfg))
    assert not list((tmp_path / "base").rglob("*.parquet*"))


def test_a_commit_that_is_gone_names_the_way_out(site: Hub, tmp_path: Path) -> None:
    cfg = shards.Config(source=NAME, count=1, revision="c" * 40)
    said = r"answers HTTP 404: .*--set shards_head\.revision=main --set shards\.revision=main"
    with pytest.raises(ValueError, match=said):
        shards.run(cfg, job(tmp_path / "base", "shards", cfg))


def test_offline_the_commit_that_was_kept_is_used_and_an_unknown_one_is_asked_of_the_user(
    site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = shards.Config(source=NAME, count=1)
    made = job(tmp_path / "base", "shards", cfg)
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"which commit of owner/words is meant by 'main'.*shards\.revision"):
        shards.run(cfg, made)
    monkeypatch.delenv("NANOCHAT_OFFLINE")
    shards.run(cfg, made)
    asked = len(site.asked)
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    assert shards.run(cfg, made)["revision"] == OLD
    assert len(site.asked) == asked


def test_a_hub_that_is_away_for_a_moment_is_asked_again(
    site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    site.trouble = [503, 502]
    cfg = shards.Config(source=NAME, count=1)
    made = job(tmp_path / "base", "shards", cfg)
    assert shards.run(cfg, made)["revision"] == OLD
    assert "waiting for the network: 127.0.0.1:" in (made.path / "metrics.jsonl").read_text()
    site.trouble = [503] * 3
    other = shards.Config(source=NAME, count=1, revision="v/2")
    with pytest.raises(ValueError, match="gave no answer in 0 min: HTTP 503; the same command tries again"):
        shards.run(other, job(tmp_path / "base", "shards", other, minutes=0))


def test_the_token_is_shown_to_the_hub_and_to_nobody_else(
    site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cfg = shards.Config(source=NAME, count=1)
    made = job(tmp_path / "base", "shards", cfg)
    shards.run(cfg, made)
    assert {(place, shown) for place, _, _, shown in site.asked} == {
        ("hub", "Bearer hf_secret"),
        ("cdn", None),
    }
    site.asked.clear()
    name = "shard_00000.parquet"
    fetch_one(Remote(f"{site.cdn}/cdn/{name}", tmp_path / name))  # a URL that is not the hub's
    assert [shown for _, _, _, shown in site.asked] == [None]
    kept = [path for path in (tmp_path / "base").rglob("*") if path.is_file()]
    assert not any(b"hf_secret" in path.read_bytes() for path in kept)


def test_who_may_not_have_a_file_is_told_of_tokens(
    site: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.trouble = [401, 401]
    cfg = shards.Config(source=NAME, count=1)
    with pytest.raises(ValueError, match=r"answers HTTP 401: .*set HF_TOKEN or run `hf auth login`"):
        shards.run(cfg, job(tmp_path / "base", "shards", cfg))
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(ValueError, match=r"answers HTTP 401: the token .* is refused") as refused:
        shards.run(cfg, job(tmp_path / "base", "shards", cfg))
    assert "hf_expired" not in str(refused.value)
