"""Data that is not what it should be, at each door it comes in by: the file is named, and what was due."""

import functools
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Job, Metrics, Runtime
from nanochat_core.artifacts.store import write_whole
from nanochat_core.data.packed import packed
from nanochat_core.data.tasks import humaneval, load_task, tables
from nanochat_core.data.tasks.identity import mended
from nanochat_core.infer import sandbox
from nanochat_core.sources import documents, shard_sets
from nanochat_core.sources.raw_text import read_documents
from nanochat_core.stages import assets
from nanochat_core.tokenizer.bpe import train

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I am Ada"}]


def run(base: Path, **config: Any) -> tuple[Job, Metrics]:
    cfg = assets.Config(**config)
    path = base / "assets" / "f"
    path.mkdir(parents=True, exist_ok=True)
    job = Job("assets", cfg, {}, path, Runtime(base_dir=base), "f")
    return job, assets.run(cfg, job)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of nothing much, and programs that run without bubblewrap."""
    monkeypatch.setattr("nanochat_core.sources.bundle.files", BUNDLE.copy)
    weaker = functools.partial(sandbox.run_program, allow_weaker=True)
    monkeypatch.setattr(humaneval, "run_program", weaker)


BUNDLE = {
    "core.yaml": "icl_tasks:\n- label: t\n  dataset_uri: t.jsonl\n  num_fewshot: [0]\n"
    "  icl_task_type: schema\n",
    "eval_meta_data.csv": "Eval Task,Random baseline\nt,50\n",
    "eval_data/t.jsonl": '{"context_options": ["a", "b"], "continuation": "c", "gold": 0}\n',
}


def published(root: Path, other: dict[str, bytes] | None = None) -> None:
    """The downloads of a real run, brought by hand."""
    root.mkdir(parents=True)
    with zipfile.ZipFile(root / "eval_bundle.zip", "w") as archive:
        for each, text in (BUNDLE | (other or {})).items():
            archive.writestr(f"eval_bundle/{each}", text)
    (root / "words_alpha.txt").write_text("kiwi\n")
    (root / "identity_conversations.jsonl").write_text(json.dumps(TALK) + "\n")


CONVERSATIONS: list[tuple[bytes, str]] = [
    (b"", "is empty: expected one conversation a line"),
    (b"{}\n", "line 1: expected a list of messages"),
    (json.dumps(TALK).encode() + b"\n[1]\n", "line 2: expected a list of messages .*message 0 is not a dict"),
    (b'[{"role": "user"\n', "line 1: expected a list of messages .*not JSON"),
    (b'[{"role": "user", "content": "caf\xe9"}]\n', "line 1: expected .*not UTF-8"),
    (json.dumps(TALK[::-1]).encode(), "line 1: .*message 0 has role 'assistant' where 'user' is due"),
    (json.dumps(TALK[:1]).encode(), "line 1: .*the last message is not the assistant's"),
    (
        json.dumps([TALK[0], {"role": "assistant", "content": 5}]).encode(),
        "line 1: .*neither a str nor a list",
    ),
    (json.dumps([{"role": "bot", "content": "x"}]).encode(), "line 1: .*role 'bot'"),
    (json.dumps({"messages": TALK, "answer": 3}).encode(), "line 1: .*'answer' is not a text"),
    (b"7\n", "line 1: expected a list of messages"),
]


@pytest.mark.parametrize(("content", "said"), CONVERSATIONS)
def test_conversations_of_ones_own(tmp_path: Path, quick: None, content: bytes, said: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mine\.jsonl.*{said}"):
        load_task(f"custom_json:{path}", "train")
    with pytest.raises(ValueError, match=rf"mine\.jsonl.*{said}"):
        run(tmp_path, identity=str(path))


def test_identity_of_ones_own_is_kept_as_it_was_and_watched(tmp_path: Path, quick: None) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"messages": TALK, "answer": "Ada"}).encode() + b"\n")
    job, metrics = run(tmp_path, identity=str(path))
    assert metrics["identity_conversations"] == 1
    store.commit(job.path, tmp_path, metrics, job.shared, 1.0, {}, None, job.origins)
    task = load_task("identity", "train", assets=job.path, size=4)
    assert task[3]["messages"] == TALK and task.correct(task[0], "my name is ada")
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(store.Damaged, match=r"mine\.jsonl, which it was made from, has changed"):
        store.verify(job.path, tmp_path)
    with pytest.raises(ValueError, match=r"there is no file .*gone\.jsonl; `nanochat identity"):
        run(tmp_path, identity=str(tmp_path / "gone.jsonl"))


def test_a_published_question_without_an_answer_is_cut_off_and_told(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.dumps(TALK).encode() + b"\n"
    lines = [
        whole,
        json.dumps([*TALK, TALK[0]]).encode() + b"\n",
        json.dumps(TALK[:1]).encode(),
        b"\n",
        whole,
    ]
    root = tmp_path / "downloads" / "assets"
    published(root)
    (root / "identity_conversations.jsonl").write_bytes(b"".join(lines))
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    own = {"eval_bundle.zip": ""}  # the test's, not the published one
    job, metrics = run(tmp_path, source="hub", tasks=(), sha256=own)
    assert metrics["identity_conversations"] == 3
    assert "2 of the published identity conversations ended in a question" in capsys.readouterr().out
    assert "which was cut off" in (job.path / "metrics.jsonl").read_text()
    assert (job.path / "identity_conversations.jsonl").read_bytes().startswith(whole)
    broken = whole + b"[1]\n{\n"
    assert mended(broken) == (broken, 0)  # to be refused with its line


GSM8K = {"question": "How much?", "answer": "#### 3"}


def table(folder: Path, name: str, content: Any) -> Path:
    path = folder / "gsm8k" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        pq.write_table(content if isinstance(content, pa.Table) else pa.table(content), path)
    return path


def line(**row: Any) -> bytes:
    return json.dumps(GSM8K | row).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("test.parquet", {"question": ["?"]}, "gsm8k has no column 'answer', only question"),
        (
            "test.parquet",
            {"question": [1], "answer": ["x"]},
            "gsm8k/test, row 1, makes no conversation: .*int",
        ),
        ("test.parquet", {"question": ["?"], "answer": [None]}, "gsm8k/test, row 1, makes no conversation"),
        ("test.parquet", {"question": [], "answer": []}, "gsm8k is empty: expected at least one row"),
        ("test.parquet", b"PAR1 cut", r"test\.parquet is not a parquet file that can be read"),
        ("test.parquet", b"", r"test\.parquet is not a parquet file that can be read"),
        ("test.jsonl", line() + b"{]\n", r"test\.jsonl, line 2: expected one JSON object a line"),
        ("test.jsonl", line() + b"[]\n", r"test\.jsonl, line 2: expected one JSON object a line"),
        ("test.jsonl", line() + b'{"question": "\xe9"}', r"test\.jsonl, line 2: .*not UTF-8"),
        ("test.jsonl", line() + line(answer=7), r"test\.jsonl: a field has not the same type in all lines"),
        ("test.jsonl", b"\n", "gsm8k has no column 'question'"),
        ("other.jsonl", line(), r"neither .*test\.parquet nor test\.jsonl is there"),
    ],
)
def test_tables_of_tasks(tmp_path: Path, quick: None, name: str, content: Any, said: str) -> None:
    tables.table.cache_clear()
    mine = tmp_path / "mine"
    table(mine, "train.jsonl", line() * 2)
    table(mine, name, content)
    with pytest.raises(ValueError, match=said):
        run(tmp_path, task_folder=str(mine), tasks=("gsm8k",))


def test_a_cut_parquet_and_one_of_a_single_row(tmp_path: Path, quick: None) -> None:
    tables.table.cache_clear()
    mine = tmp_path / "mine"
    alone = table(mine, "train.parquet", {"question": ["?"], "answer": ["#### 3"]})
    whole = table(mine, "test.parquet", {"question": ["?"] * 500, "answer": ["#### 3"] * 500})
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"test\.parquet is not a parquet file that can be read"):
        run(tmp_path, task_folder=str(mine), tasks=("gsm8k",))
    whole.write_bytes(data)
    with pytest.raises(ValueError, match=r"gsm8k \(train\) has one row: two are needed"):
        run(tmp_path, task_folder=str(mine), tasks=("gsm8k",))
    table(mine, alone.name, {"question": ["?", "!"], "answer": ["#### 3"] * 2})
    shutil.rmtree(tmp_path / "assets")
    job, _ = run(tmp_path, task_folder=str(mine), tasks=("gsm8k",))
    assert len(load_task("gsm8k", "train", assets=job.path)) == 1
    assert str(mine) in job.origins


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("core.yaml", b"icl_tasks: [", "eval_bundle is not a CORE bundle"),
        ("core.yaml", b"icl_tasks:\n- label: \xe9\n", r"core\.yaml, line 2, is not UTF-8"),
        ("core.yaml", b"", "eval_bundle is not a CORE bundle"),
        (
            "eval_meta_data.csv",
            b"Eval Task,Random baseline\n",
            "eval_bundle is not a CORE bundle: KeyError 't'",
        ),
        ("eval_meta_data.csv", b"Eval Task,Random baseline\nt,many\n", "eval_bundle is not a CORE bundle"),
        ("eval_data/t.jsonl", b"", r"t\.jsonl is empty: expected one example a line"),
        ("eval_data/t.jsonl", b"{\n", r"t\.jsonl, line 1: not JSON"),
        ("eval_data/t.jsonl", b'{"query": "x"}\n', r"t\.jsonl, line 1: expected 'context_options' as list"),
        ("eval_data/t.jsonl", b'{"query": "\xe9"}\n', r"t\.jsonl, line 1, is not UTF-8"),
    ],
)
def test_the_evaluation_bundle(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str
) -> None:
    published(tmp_path / "downloads" / "assets", {name: content})
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    with pytest.raises(ValueError, match=said):
        run(tmp_path, source="hub", tasks=(), sha256={"eval_bundle.zip": ""})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"words_alpha\.txt is empty: expected one word a line"),
        (b"kiwi\ncaf\xe9\n", r"words_alpha\.txt, line 2, is not UTF-8"),
    ],
)
def test_the_list_of_words(tmp_path: Path, quick: None, content: bytes, said: str) -> None:
    job, _ = run(tmp_path)
    (job.path / "words_alpha.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        assets.check(job.path)


def test_a_list_of_words_too_short_to_ask_about_is_no_endless_search(tmp_path: Path) -> None:
    (tmp_path / "words_alpha.txt").write_text("a\n")
    with pytest.raises(ValueError, match="the list of 1 words has none for"):
        for split in ("train", "validation", "test"):
            load_task("spellingbee", split, assets=tmp_path)  # type: ignore[arg-type]


def shard(folder: Path, name: str, texts: Any) -> Path:
    """A parquet file of row groups of two."""
    folder.mkdir(exist_ok=True)
    column = texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string())
    pq.write_table(pa.table({"text": column}), folder / name, row_group_size=2)
    return folder / name


def latin_1(*texts: str) -> pa.Array:
    """Strings whose bytes are not UTF-8: what a careless converter leaves."""
    encoded = pa.array([text.encode("latin-1") for text in texts], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(encoded), encoded.buffers())


@pytest.mark.parametrize("broken", ["a.parquet", "z.parquet"])  # the one for validation is the last
@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (latin_1("one", "two", "three", "café"), "row group 1: a text is not UTF-8 .*convert the file first"),
        ([None, "", " \n", None], "holds no text: all 4 rows of column 'text' are null or blank"),
        ([], "is empty: expected at least one document"),
    ],
)
def test_shards_that_cannot_be_trained_on(tmp_path: Path, broken: str, texts: Any, said: str) -> None:
    for name in ("a.parquet", "m.parquet", "z.parquet"):
        shard(tmp_path / "mine", name, ["fine"])
    shard(tmp_path / "mine", broken, texts)
    with pytest.raises(ValueError, match=rf"{broken}.*{said}"):
        shard_sets.local(tmp_path / "mine", tmp_path)


def test_a_shard_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "mine", "a.parquet", [f"{i} {'text ' * 200}" for i in range(8)])
    shard(tmp_path / "mine", "z.parquet", ["fine"])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)  # the first pages; the footer is whole
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet, row group 0, cannot be read"):
        shard_sets.local(tmp_path / "mine", tmp_path)


def test_rows_without_text_are_left_out_wherever_text_is_read(tmp_path: Path) -> None:
    """Packing, the tokenizer and bits per byte read by these two."""
    full = ["one two", "three", "four five six", "seven", "eight nine", "ten"]
    gaps = [
        None,
        "one two",
        " \n",
        "three",
        None,
        "",
        "four five six",
        "seven",
        "",
        "eight nine",
        "ten",
        "  ",
    ]
    for name, texts in (("full", full), ("gaps", gaps)):
        shard(tmp_path / name, "a.parquet", texts)
        shard(tmp_path / name, "z.parquet", ["x", None])
    tokenizer = train(full, 265)
    batches = {}
    for name in ("full", "gaps"):
        found = shard_sets.local(tmp_path / name, tmp_path)
        assert (found.train[0].rows, found.validation[0].rows) == (6, 1)
        write_whole(tmp_path / name / "shards.json", shard_sets.manifest(found, tmp_path / "downloads"))
        assert list(documents.texts(tmp_path / name, "train")) == full
        for rank in range(2):
            read = packed(found.train, tokenizer, rows=1, T=8, cursor={}, rank=rank, size=2)
            batches[name, rank] = [next(read) for _ in range(12)]
            for at in (0, 3, 7):  # the cursor is exact across what is left out, and over epochs
                again = packed(
                    found.train,
                    tokenizer,
                    rows=1,
                    T=8,
                    cursor=batches[name, rank][at].cursor(),
                    rank=rank,
                    size=2,
                )
                assert next(again).inputs.equal(batches[name, rank][at + 1].inputs)
    for rank in range(2):
        assert [batch.inputs.tolist() for batch in batches["full", rank]] == [
            batch.inputs.tolist() for batch in batches["gaps", rank]
        ]


def test_a_parquet_file_to_repackage_that_is_not_utf_8_is_named_with_its_rows(tmp_path: Path) -> None:
    path = shard(tmp_path, "a.parquet", latin_1("one", "café"))
    with pytest.raises(ValueError, match=r"a\.parquet, rows 1 to 2: a text is not UTF-8"):
        list(read_documents(str(path)))
