"""The stages that download, against a server of a folder."""

import functools
import json
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.artifacts.stage import Job, Runtime
from nanochat_core.data.tasks import load_task
from nanochat_core.sources.documents import shard_list, texts
from nanochat_core.sources.repackage import Wanted, repackage
from nanochat_core.sources.shard_sets import write_shard
from nanochat_core.stages import assets, shards


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and where it is served from."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def job(base: Path, stage: str, cfg: Any) -> Job:
    path = base / stage / "f"
    path.mkdir(parents=True, exist_ok=True)
    return Job(stage, cfg, {}, path, Runtime(base_dir=base), "f")


def test_shards_come_from_urls_once_and_are_verified_with_the_artefact(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    names = [f"shard_{i}.parquet" for i in range(3)]
    for i, name in enumerate(names):
        write_shard(folder / name, [f"document {i} {j}" for j in range(8)])
    cfg = shards.Config(source=tuple(f"{url}/{name}" for name in names))
    first = job(tmp_path / "base", "shards", cfg)
    shards.run(cfg, first)
    listed = shard_list(first.path)
    assert [shard.name for shard in listed.train + listed.validation] == names
    assert {shard.path for shard in listed.train + listed.validation} == first.shared
    assert len(list(texts(first.path, "train"))) == 16
    head = shards.Config(source=cfg.source, count=1)
    second = job(tmp_path / "base", "shards_head", head)
    shards.run(head, second)
    assert [s.path for s in shard_list(second.path).train] == [
        listed.train[0].path
    ]  # shared, not fetched again
    for name in names:
        (folder / name).unlink()
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    shards.run(cfg, first)  # all is here: nothing is asked
    listed.train[0].path.unlink()
    with pytest.raises(
        ValueError, match=r"NANOCHAT_OFFLINE is set and shard_0\.parquet is not here: bring http"
    ):
        shards.run(cfg, first)


def test_a_download_that_is_no_shard_is_named(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    for name in ("a.parquet", "b.parquet"):
        (folder / name).write_text("<html>moved</html>")
    cfg = shards.Config(source=(f"{url}/a.parquet", f"{url}/b.parquet"))
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        shards.run(cfg, job(tmp_path / "base", "shards", cfg))


def test_downloaded_assets_are_unpacked_and_read(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, url = served
    with zipfile.ZipFile(folder / "bundle.zip", "w") as archive:
        listing = {"label": "t", "dataset_uri": "t.jsonl", "num_fewshot": [0], "icl_task_type": "schema"}
        archive.writestr("eval_bundle/core.yaml", json.dumps({"icl_tasks": [listing]}))
        archive.writestr("eval_bundle/eval_meta_data.csv", "Eval Task,Random baseline\nt,50\n")
        example = {"context_options": ["a", "b"], "continuation": "c", "gold": 0}
        archive.writestr("eval_bundle/eval_data/t.jsonl", json.dumps(example))
        archive.writestr("__MACOSX/junk", "x")
    talk = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "nanochat"}]
    (folder / "identity.jsonl").write_text(json.dumps(talk) + "\n")
    (folder / "words.txt").write_text("kiwi\nplum\n")
    cfg = assets.Config(
        source="hub",
        bundle_url=f"{url}/bundle.zip",
        identity_url=f"{url}/identity.jsonl",
        words_url=f"{url}/words.txt",
        tasks=(),
    )
    made = job(tmp_path / "base", "assets", cfg)
    metrics = assets.run(cfg, made)
    assert metrics == {"core_tasks": 1, "core_examples": 1, "identity_conversations": 1, "words": 2}
    assert not (made.path / "__MACOSX").exists()
    assert load_task("identity", "train", assets=made.path)[0]["messages"] == talk
    assert assets.run(cfg, made) == metrics  # over what a killed attempt may have left

    monkeypatch.setitem(assets.PINNED, cfg.bundle_url, "e" * 64)  # known, and not what comes
    said = (
        rf"expected sha256 {'e' * 64}, \w{{64}} came; if that is .* --set 'assets\.sha256={{\"eval_bundle\."
    )
    with pytest.raises(ValueError, match=said):
        assets.run(cfg, job(tmp_path / "other", "assets", cfg))
    as_it_is = cfg.model_copy(update={"sha256": {"eval_bundle.zip": ""}})
    assert assets.run(as_it_is, job(tmp_path / "other", "assets", as_it_is)) == metrics

    (folder / "words.txt").unlink()
    pinned = cfg.model_copy(update={"sha256": {"words_alpha.txt": "0" * 64}})  # so the one we have is not it
    with pytest.raises(ValueError, match=r"words\.txt answers HTTP 404"):
        assets.run(pinned, made)


def test_a_folder_on_another_file_system_is_copied_once(tmp_path: Path) -> None:
    there = tmp_path / "bucket"
    there.mkdir()
    for i in range(3):
        write_shard(there / f"{i}.parquet", [f"document {i}"])
    cfg = shards.Config(source=f"file://{there}", count=1)
    made = job(tmp_path / "base", "shards", cfg)
    shards.run(cfg, made)
    assert (list(texts(made.path, "train")), list(texts(made.path, "validation"))) == (
        ["document 0"],
        ["document 2"],
    )
    before = shard_list(made.path).train[0].path.stat().st_mtime_ns
    shards.run(cfg, made)
    assert shard_list(made.path).train[0].path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"holds no \.parquet, \.jsonl or \.txt file"):
        shards.run(shards.Config(source=f"file://{tmp_path}/none"), made)


def test_a_folder_is_named_in_full_wherever_the_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shards.Config(source="mine").source == str(tmp_path / "mine")
    assert assets.Config(identity="mine.jsonl").identity == str(tmp_path / "mine.jsonl")
    assert shards.Config().source == "embedded" and assets.Config().task_folder is None


def test_a_source_that_cannot_be_meant_is_refused_at_once() -> None:
    for source in ((), "", ("a", "b")):
        with pytest.raises(ValueError, match="source"):
            shards.Config(source=source)
    with pytest.raises(ValueError, match="max_chars belongs to the embedded corpus"):
        shards.Config(source="/somewhere", max_chars=100_000)


def test_text_on_another_file_system_is_copied_once_and_again_where_it_changed(tmp_path: Path) -> None:
    import fsspec

    there = fsspec.filesystem("memory")
    there.pipe("/bucket/a.jsonl", b'{"text": "one"}\n{"text": "two"}\n')
    there.pipe("/bucket/below/b.txt", b"three")
    cfg = shards.Config(source="memory://bucket")
    made = job(tmp_path / "base", "shards", cfg)
    shards.run(cfg, made)
    assert sorted([*texts(made.path, "train"), *texts(made.path, "validation")]) == ["one", "three", "two"]
    (copy,) = (tmp_path / "base").rglob("a.jsonl")
    before = copy.stat().st_mtime_ns
    shards.run(cfg, made)
    assert copy.stat().st_mtime_ns == before
    there.pipe("/bucket/a.jsonl", b'{"text": "six"}\n{"text": "two"}\n')  # as long as it was
    shards.run(cfg, made)
    assert sorted([*texts(made.path, "train"), *texts(made.path, "validation")]) == ["six", "three", "two"]
    there.rm("/bucket", recursive=True)


def test_a_list_of_urls_of_any_kind_keeps_its_order(tmp_path: Path) -> None:
    import fsspec

    there = fsspec.filesystem("memory")
    for name in ("c", "a", "b"):
        write_shard(tmp_path / f"{name}.parquet", [f"document {name}"])
        there.put(str(tmp_path / f"{name}.parquet"), f"/list/{name}/x.parquet")
    cfg = shards.Config(source=("memory://list/c/x.parquet", "memory://list/a", "memory://list/b/x.parquet"))
    made = job(tmp_path / "base", "shards", cfg)
    shards.run(cfg, made)
    assert list(texts(made.path, "train")) == ["document c", "document a"]
    assert list(texts(made.path, "validation")) == ["document b"]
    cfg = shards.Config(source=("memory://list/c/x.parquet", "memory://list"))
    with pytest.raises(ValueError, match="a file is named twice"):
        shards.run(cfg, job(tmp_path / "base", "shards", cfg))
    there.rm("/list", recursive=True)


def test_a_folder_of_ones_own_is_watched_for_changes(tmp_path: Path) -> None:
    from nanochat_core.artifacts import store

    mine = tmp_path / "mine"
    mine.mkdir()
    for i in range(3):
        write_shard(mine / f"{i}.parquet", [f"document {i}"])
    cfg = shards.Config(source=str(mine))
    made = job(tmp_path / "base", "shards", cfg)
    store.commit(
        made.path, tmp_path / "base", shards.run(cfg, made), made.shared, 1.0, {}, None, made.origins
    )
    assert store.verify(made.path, tmp_path / "base") is not None
    write_shard(mine / "1.parquet", ["something else"])
    with pytest.raises(store.Damaged, match=r"mine/1\.parquet, which it was made from, has changed"):
        store.verify(made.path, tmp_path / "base")


def test_the_commit_that_the_hub_names_is_kept(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, url = served
    for i in range(3):
        write_shard(folder / f"{i}.parquet", [f"document {i}"])

    class Hub(Quiet):
        def end_headers(self) -> None:
            self.send_header("X-Repo-Commit", "b" * 40 if self.path.startswith("/1") else "a" * 40)
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        cfg = shards.Config(source=(f"{url}/0.parquet", f"{url}/2.parquet"))
        assert shards.run(cfg, job(tmp_path / "base", "shards", cfg))["revision"] == "a" * 40
        cfg = shards.Config(source=tuple(f"{url}/{i}.parquet" for i in range(3)))
        with pytest.raises(
            ValueError, match=r"are of 2 commits \(.*0\.parquet|2\.parquet of aaa.*; .*1\.parquet of b"
        ):
            shards.run(cfg, job(tmp_path / "base", "more", cfg))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.slow
def test_shards_and_repackage_read_from_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server")
    fsspec = pytest.importorskip("fsspec")
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in (
        ("ACCESS_KEY_ID", "test"),
        ("SECRET_ACCESS_KEY", "test"),
        ("DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    settings = {"endpoint_url": f"http://{host}:{port}"}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    try:
        bucket = fsspec.filesystem("s3", **settings)
        bucket.mkdir("mine")
        for i in range(3):
            write_shard(tmp_path / f"{i}.parquet", [f"document {i} {j}" for j in range(50)])
            bucket.put_file(str(tmp_path / f"{i}.parquet"), f"mine/text/{i}.parquet")
        cfg = shards.Config(source="s3://mine/text", count=1)
        made = job(tmp_path / "base", "shards", cfg)
        shards.run(cfg, made)
        assert [shard.name for shard in shard_list(made.path).train] == ["0.parquet"]
        assert [text.split()[1] for text in texts(made.path, "validation")] == ["2"] * 50
        out = tmp_path / "out"
        repackaged = repackage(Wanted("s3://mine/text/*.parquet"), out)
        assert sum(shard.rows for shard in repackaged.train + repackaged.validation) == 150
        assert repackage(Wanted("s3://mine/text/*.parquet"), out) == repackaged
    finally:
        server.stop()
