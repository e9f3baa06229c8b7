"""Shards as mapped task runs: which files each brings, how many at once, and the stage behind them."""

import functools
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from toys import make

from flows import downloads
from nanochat_core.artifacts.mirror import of
from nanochat_core.artifacts.progress import Row
from nanochat_core.artifacts.stage import Interrupted
from nanochat_core.runner import launch
from nanochat_core.runner import plan as plans
from nanochat_core.runner.sync import Copies
from nanochat_core.sources.shard_sets import write_shard

pytestmark = pytest.mark.usefixtures("prefect_server")
FILES = 30


class Slow(SimpleHTTPRequestHandler):
    """Counts how many answers are under way at once."""

    now = most = asked = 0
    guard = threading.Lock()
    pause = 0.02
    away = 0  # answers that are errors yet

    def do_GET(self) -> None:
        with Slow.guard:
            Slow.away, gone = max(0, Slow.away - 1), Slow.away > 0
        if gone:
            self.send_error(503)
            return
        with Slow.guard:
            Slow.now, Slow.asked = Slow.now + 1, Slow.asked + 1
            Slow.most = max(Slow.most, Slow.now)
        time.sleep(Slow.pause)
        try:
            super().do_GET()
        finally:
            with Slow.guard:
                Slow.now -= 1

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def plan(tmp_path: Path) -> Iterator[plans.Plan]:
    """`tiny` with thirty shards of a server's, three at once."""
    folder = tmp_path / "served"
    folder.mkdir()
    for i in range(FILES):
        write_shard(folder / f"shard_{i:02d}.parquet", [f"document {i} {j}" for j in range(4)])
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Slow, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Slow.now = Slow.most = Slow.asked = Slow.away = 0
    urls = [f"http://127.0.0.1:{server.server_port}/shard_{i:02d}.parquet" for i in range(FILES)]
    profile = tmp_path / "served.toml"
    profile.write_text(f"[shards]\nsource = {urls!r}\nworkers = 3\n")
    yield plans.load(str(profile), base_dir=tmp_path / "base", until="shards")
    server.shutdown()
    server.server_close()
    thread.join()


@flow(name="bring")
def bring(plan: Any, stopping: Any, see: Any = None) -> list[dict[str, int]]:
    return [future.result() for future in downloads.bring(plan, "shards", stopping, see or len)]


def test_shards_arrive_in_mapped_task_runs_so_many_at_once(plan: plans.Plan) -> None:
    state = bring(plan, lambda: False, return_state=True)
    brought = state.result()
    assert sum(one["files"] for one in brought) == FILES
    assert len(brought) == 15 <= downloads.TASKS  # two files each
    assert 1 < Slow.most <= 3
    assert len(list((plan.runtime.base_dir / "downloads").glob("*/*.parquet"))) == FILES
    with get_client(sync_client=True) as client:
        for _ in range(100):
            names = {run.name for run in client.read_task_runs()}
            if "shards 29-30" in names:
                break
            time.sleep(0.1)
    assert {"shards 1-2", "shards 29-30"} <= names
    asked = Slow.asked
    bring(plan, lambda: False)
    assert Slow.asked == asked  # all is here: nothing is asked


def test_a_file_that_cannot_be_had_names_itself_and_ends_the_others(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served" / "shard_07.parquet").unlink()
    with pytest.raises(ValueError, match=r"shard_07\.parquet"):
        bring(plan, lambda: False)


def test_what_is_waited_for_is_seen_and_given_up_when_the_time_is_up(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Slow, "away", 3)
    rows: list[Row] = []
    bring(plan, lambda: False, rows.append)
    assert any("waiting for the network: 127.0.0.1:" in row.get("waiting", "") for row in rows)
    assert (rows[-1]["step"], rows[-1]["steps"]) == (FILES, FILES)
    monkeypatch.setattr(Slow, "away", 1000)
    at_once = plans.load(plan.profile, ["runtime.network_minutes=0"], base_dir=tmp_path / "b", until="shards")
    with pytest.raises(ValueError, match="nothing came in 0 min: HTTP 503"):
        bring(at_once, lambda: False)


def test_a_cancelled_download_stops_and_keeps_what_arrived(
    plan: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(Slow, "pause", 0.2)
    with pytest.raises(Interrupted):
        bring(plan, lambda: Slow.asked > 5)
    here = len(list((plan.runtime.base_dir / "downloads").glob("*/*.parquet")))
    assert 0 < here < FILES


def test_without_a_network_source_there_is_nothing_to_map(tmp_path: Path) -> None:
    assert downloads.bring(plans.load("tiny", base_dir=tmp_path), "shards", lambda: False) == []
    assert downloads.bring(plans.load("tiny", base_dir=tmp_path), "mid", lambda: False) == []


def test_what_the_mirror_has_is_not_downloaded(plan: plans.Plan, tmp_path: Path) -> None:
    mirror = f"runtime.mirror=file://{tmp_path}/mirror"
    here, there = (
        plans.load(plan.profile, [mirror], base_dir=tmp_path / name, until="shards")
        for name in ("here", "there")
    )
    make(here, "shards")
    held = of(here.runtime)
    assert held is not None
    Copies(held, here.jobs, here.runtime.base_dir, print).round()
    asked = Slow.asked
    assert downloads.bring(there, "shards", lambda: False) == []
    launch.launch(there, "shards")
    assert Slow.asked == asked > 0
    assert len(list((tmp_path / "there" / "downloads").rglob("*.parquet"))) == FILES
