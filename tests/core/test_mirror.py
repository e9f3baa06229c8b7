"""A run goes on from its mirror on another machine; half an upload, damage and absence do not deceive it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from toys import Toy

from nanochat_core.artifacts import mirror, store
from nanochat_core.artifacts.progress import is_progress
from nanochat_core.runner import launch, sync
from nanochat_core.runner import plan as plans

BUCKET = "runs"


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 server of our own, as fsspec's own configuration names it."""
    moto = pytest.importorskip("moto.server")
    import fsspec

    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    before = dict(os.environ)
    os.environ.update(keys | {"FSSPEC_S3_ENDPOINT_URL": endpoint})
    fsspec.config.conf["s3"] = {"endpoint_url": endpoint}
    fsspec.filesystem("s3", **fsspec.config.conf["s3"]).mkdir(BUCKET)
    yield f"s3://{BUCKET}"
    os.environ.clear()
    os.environ.update(before)
    fsspec.config.conf.pop("s3")
    server.stop()


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/mirror"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def sender(plan: plans.Plan, said: list[str]) -> sync.Copies:
    held = mirror.of(plan.runtime)
    assert held is not None
    return sync.Copies(held, plan.jobs, plan.runtime.base_dir, said.append)


def tiny(base: Path, url: str) -> plans.Plan:
    return plans.load(
        "tiny", [f"runtime.mirror={url}", "runtime.save_steps=2"], base_dir=base, until="pretrain"
    )


def weights_when_left_alone(base: Path, *overrides: str) -> bytes:
    toy = Toy(base)
    made = toy.plan(*overrides, until="pretrain")
    toy.make(made)
    return (made.jobs["pretrain"].path / "model.safetensors").read_bytes()


def killed_once_sent(here: plans.Plan, step: int) -> int:
    """Pretrain here, killed once the mirror has a checkpoint of that step or a later one; the one it has."""
    path = here.jobs["pretrain"].path
    path.mkdir(parents=True)
    store.write_json(path / "job.json", launch.describe(here, "pretrain", None))
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat_core.runner.launch", str(path / "job.json")], start_new_session=True
    )
    send, held = sender(here, []), mirror.of(here.runtime)
    assert held is not None
    deadline = time.monotonic() + 120
    try:
        while (held.look(here.jobs["pretrain"]).step or 0) < step:
            assert process.poll() is None and time.monotonic() < deadline
            send.round()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reached = held.look(here.jobs["pretrain"]).step
    assert reached is not None and held.look(here.jobs["pretrain"]).result is None
    shutil.rmtree(here.runtime.base_dir)  # that machine is gone
    return reached


def test_a_run_killed_on_one_machine_goes_on_where_its_mirror_is(toy: Toy, url: str, tmp_path: Path) -> None:
    slow = (f"runtime.mirror={url}", "pretrain.steps=60", "pretrain.pause=0.05")
    here, there = toy.plan(*slow), Toy(tmp_path / "there")
    toy.make(here, "shards")
    reached = killed_once_sent(here, 4)
    plan = there.plan(*slow)
    verdict = plans.explain(plan)["pretrain"]
    assert (verdict.state, verdict.step) == ("resume", reached)
    for row in ("shards", "pretrain"):
        launch.launch(plan, row)
    assert there.starts(plan, "pretrain") == [str(reached)]
    weights = (plan.jobs["pretrain"].path / "model.safetensors").read_bytes()
    assert weights == weights_when_left_alone(tmp_path / "alone", "pretrain.steps=60")


@pytest.mark.slow
def test_a_run_killed_on_one_machine_ends_on_another_in_the_same_weights(
    url: str, tiny_base: Path, tmp_path: Path
) -> None:
    here, there = tiny(tmp_path / "a", url), tiny(tmp_path / "b", url)
    shutil.copytree(tiny_base, here.runtime.base_dir)
    shutil.rmtree(here.jobs["pretrain"].path.parent)
    reached = killed_once_sent(here, 4)
    verdicts = plans.explain(there)
    assert verdicts["tokenizer"] == ("fetch", "finished in the mirror", None, verdicts["tokenizer"].seconds)
    assert (verdicts["pretrain"].state, verdicts["pretrain"].step) == ("resume", reached)
    for row in there.jobs:
        launch.launch(there, row)
    held = mirror.of(there.runtime)
    assert held is not None
    log = (there.jobs["pretrain"].path / "log.txt").read_text()
    assert f"going on from the checkpoint at step {reached}" in log
    attempts = [event["event"] for event in store.read_attempts(there.jobs["pretrain"].path)]
    assert attempts.count("started") == 2  # the first of them on the other machine
    whole = tiny_base / "pretrain" / there.jobs["pretrain"].fingerprint
    for name in ("model.safetensors", "samples.md"):
        assert (there.jobs["pretrain"].path / name).read_bytes() == (whole / name).read_bytes()

    def losses(folder: Path) -> list[Any]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(row["step"], row.get("loss"), row.get("val_bpb")) for row in rows]

    assert losses(there.jobs["pretrain"].path) == losses(whole)
    assert plans.judge(there, "tokenizer", {}).state == "hit"
    assert (there.runtime.base_dir / "downloads").is_dir()  # what the artefacts rely on came along
    assert sender(there, []).round() == ["pretrain"]  # and what was made here is sent, the rest being there
    assert held.look(there.jobs["pretrain"]).step is None  # a finished stage needs no checkpoint


@pytest.fixture
def mirrored(toy: Toy, url: str, tmp_path: Path) -> tuple[plans.Plan, plans.Plan]:
    """A finished toy run that has been sent, and the same plan on a machine with nothing."""
    here = toy.plan(f"runtime.mirror={url}", "pretrain.steps=1", "mid.steps=1", "sft.steps=1")
    toy.make(here)
    assert sender(here, []).round() == list(here.jobs)
    there = plans.load(
        here.profile,
        [f"runtime.mirror={url}", "pretrain.steps=1", "mid.steps=1", "sft.steps=1"],
        base_dir=tmp_path / "there",
    )
    return here, there


def test_what_is_finished_there_is_fetched_and_not_made(mirrored: tuple[plans.Plan, plans.Plan]) -> None:
    here, there = mirrored
    assert {verdict.state for verdict in plans.explain(there).values()} == {"fetch"}
    for row, job in there.jobs.items():
        launch.launch(there, row)
        assert store.verify(job.path, there.runtime.base_dir, hashes=True) is not None
        assert (job.path / "result.json").read_bytes() != b""
        assert plans.read_job(job.path) == plans.read_job(here.jobs[row].path)
    assert not (there.runtime.base_dir / "starts").exists()  # nothing was trained here
    assert {verdict.state for verdict in plans.explain(there).values()} == {"hit"}
    assert sender(there, []).round() == []


def spoil(held: mirror.Mirror, path: str, change: Callable[[bytes], bytes]) -> None:
    held.fs.pipe_file(path, change(held.fs.cat_file(path)))


def test_damage_and_half_uploads_there_are_not_believed(mirrored: tuple[plans.Plan, plans.Plan]) -> None:
    here, there = mirrored
    held = mirror.of(there.runtime)
    assert held is not None
    root = f"{held.root}/pretrain/{there.jobs['pretrain'].fingerprint}"
    spoil(held, f"{root}/model.safetensors", lambda data: bytes([data[0] ^ 1]) + data[1:])  # one bit
    launch.launch(there, "shards")
    rows: list[dict[str, Any]] = []
    launch.launch(there, "pretrain", rows.append)
    assert "pretrain could not be fetched" in rows[0]["note"] and is_progress(rows[0])
    assert store.read_attempts(there.jobs["pretrain"].path)[-1]["event"] == "finished"  # so it was made here
    assert (there.jobs["pretrain"].path / "model.safetensors").read_bytes() == (
        here.jobs["pretrain"].path / "model.safetensors"
    ).read_bytes()
    listed = f"{held.root}/mid/{there.jobs['mid'].fingerprint}/result.json"
    whole = held.fs.cat_file(listed)
    for half in (whole[:-40], whole.replace(b'"sha256": "', b'"sha256": "0'), b"[]", b"\xff\xfe"):
        held.fs.pipe_file(listed, half)
        assert plans.judge(there, "mid", {}).state == "run"
    held.fs.rm(f"{held.root}/sft/{there.jobs['sft'].fingerprint}/model.safetensors")
    said: list[str] = []
    lock = launch.lock_path(there.runtime.base_dir, "sft", there.jobs["sft"].fingerprint)
    sync.bring(there, "sft", lock, said.append)
    assert "model.safetensors is missing" in said[0]
    assert not there.jobs["sft"].path.exists()


def test_a_list_that_leads_out_of_the_folder_is_refused(mirrored: tuple[plans.Plan, plans.Plan]) -> None:
    _, there = mirrored
    held, job = mirror.of(there.runtime), there.jobs["shards"]
    assert held is not None
    result = held.look(job).result
    assert result is not None
    for key in ("files", "shared"):
        with pytest.raises(store.Damaged, match="leads out of"):
            held.fetch(job, result | {key: {"../../../escaped": {"size": 0, "sha256": ""}}})


def test_a_later_result_is_not_overwritten_by_an_earlier_one(
    mirrored: tuple[plans.Plan, plans.Plan],
) -> None:
    here, _ = mirrored
    held, job = mirror.of(here.runtime), here.jobs["pretrain"]
    assert held is not None
    mine = json.loads((job.path / "result.json").read_text())
    for year, sent in (("2001", False), ("2999", True)):
        other = mine | {"finished": f"{year}-01-01T00:00:00Z"}
        store.write_json(job.path / "result.json", other | {"seal": store.seal(other)})
        assert held.push(job) == sent


def test_a_mirror_that_is_away_costs_words_and_not_the_run(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(sync, "AGAIN_SECONDS", (0.02, 0.05))
    place = tmp_path / "mount"
    place.write_text("a file where the share should be mounted")
    plan = toy.plan(f"runtime.mirror=file://{place}/mirror", until="pretrain")
    said: list[str] = []
    with sync.following(plan, said.append) as following:
        toy.make(plan)
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "cannot be written" in said[0] and len(said) == 1
        place.unlink()
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "answers again" in said[1]
        assert following.finish() == []
    held = mirror.of(plan.runtime)
    assert held is not None and held.look(plan.jobs["pretrain"]).result is not None


def test_a_run_that_ends_without_its_mirror_names_what_it_lacks(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "LOOK_SECONDS", 0.01)
    (tmp_path / "mount").write_text("")
    plan = toy.plan(f"runtime.mirror=file://{tmp_path}/mount/mirror", until="pretrain")
    toy.make(plan)
    said: list[str] = []
    with sync.following(plan, said.append) as following:
        assert following.finish() == ["shards", "pretrain"]
    assert "the mirror lacks shards, pretrain" in said[-1] and "nanochat mirror" in said[-1]


def test_an_address_where_nobody_answers_is_named_within_seconds(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{port}"})
    plan = toy.plan("runtime.mirror=s3://nobody/here")
    begin = time.monotonic()
    verdicts = plans.explain(plan)  # every row asks; only the first waits
    assert time.monotonic() - begin < 20
    assert verdicts["shards"].state == "run" and "s3://nobody/here does not answer" in verdicts["shards"].why


@pytest.mark.parametrize(
    ("url", "says"),
    [("/mnt/mirror", "write it as"), ("nfs4://x/y", "write it as"), ("gs://bucket/run", "not installed")],
)
def test_what_cannot_be_a_mirror_is_refused_before_anything_runs(toy: Toy, url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        plans.explain(toy.plan(f"runtime.mirror={url}"))
