"""Data that is not what it should be, at each door it comes in by: the file is named, and what was due."""

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_core import store
from nanochat_core.data.tasks import humaneval, load_task, tables
from nanochat_core.infer import sandbox
from nanochat_core.stage import Job, Metrics, Runtime
from nanochat_core.stages import assets

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
    monkeypatch.setattr("nanochat_core.data.bundle.files", BUNDLE.copy)
    weaker = functools.partial(sandbox.run_program, allow_weaker=True)
    monkeypatch.setattr(humaneval, "run_program", weaker)


BUNDLE = {
    "core.yaml": "icl_tasks:\n- label: t\n  dataset_uri: t.jsonl\n  num_fewshot: [0]\n"
    "  icl_task_type: schema\n",
    "eval_meta_data.csv": "Eval Task,Random baseline\nt,50\n",
    "eval_data/t.jsonl": '{"context_options": ["a", "b"], "continuation": "c", "gold": 0}\n',
}

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
    table(mine, "train.jsonl", line())
    table(mine, name, content)
    with pytest.raises(ValueError, match=said):
        run(tmp_path, task_folder=str(mine), tasks=("gsm8k",))


def test_a_cut_parquet_and_one_of_a_single_row(tmp_path: Path, quick: None) -> None:
    tables.table.cache_clear()
    mine = tmp_path / "mine"
    table(mine, "train.parquet", {"question": ["?"], "answer": ["#### 3"]})
    whole = table(mine, "test.parquet", {"question": ["?"] * 500, "answer": ["#### 3"] * 500})
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"test\.parquet is not a parquet file that can be read"):
        run(tmp_path, task_folder=str(mine), tasks=("gsm8k",))
    whole.write_bytes(data)
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
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for each, text in (BUNDLE | {name: content}).items():
            archive.writestr(f"eval_bundle/{each}", text)
    root = tmp_path / "downloads" / "assets"
    root.mkdir(parents=True)
    (tmp_path / "bundle.zip").rename(root / "eval_bundle.zip")  # brought by hand
    (root / "words_alpha.txt").write_text("kiwi\n")
    (root / "identity_conversations.jsonl").write_text(json.dumps(TALK) + "\n")
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
        for split in ("train", "test"):
            load_task("spellingbee", split, assets=tmp_path)  # type: ignore[arg-type]
