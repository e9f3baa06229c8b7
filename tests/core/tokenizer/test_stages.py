"""The tokenizer's two stages, on shards of a few documents."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken.load

from nanochat_core.artifacts.stage import Job, Recipe, Runtime
from nanochat_core.stages import shards, tokenizer, tokenizer_eval
from nanochat_core.stages.tokenizer import capped
from nanochat_core.tokenizer.bpe import load_tokenizer
from nanochat_core.tokenizer.samples import SAMPLES

TRAIN = [f"{text} {i}" for i in range(40) for text in SAMPLES.values()]


def job(stage: str, config: Recipe, base: Path, **inputs: Path) -> Job:
    path = base / stage / "0123"
    path.mkdir(parents=True, exist_ok=True)
    runtime = Runtime(base_dir=base, threads=1)
    return Job(stage=stage, config=config, inputs=inputs, path=path, runtime=runtime, fingerprint="0123")


def run(module: ModuleType, config: Recipe, base: Path, **inputs: Path) -> tuple[Path, dict[str, Any]]:
    made = job(module.__name__.split(".")[-1], config, base, **inputs)
    return made.path, module.run(config, made)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A finished shards artefact: one train shard, one for validation."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for name, documents in {"shard_00000": TRAIN, "shard_00001": ["validation text " * 50]}.items():
        pq.write_table(pa.table({"text": documents}), folder / f"{name}.parquet", row_group_size=16)
    path, _ = run(shards, shards.Config(source=str(folder)), tmp_path / "base")
    return path


def test_the_tokenizer_stage_trains_on_the_shards(tmp_path: Path, text: Path) -> None:
    path, metrics = run(tokenizer, tokenizer.Config(vocab_size=600), tmp_path / "base", text=text)
    loaded = load_tokenizer(path)
    assert metrics["vocab_size"] == loaded.vocab_size == 600
    assert metrics["fingerprint"] == loaded.fingerprint
    assert metrics["bytes_per_token"] > 2
    progress = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert (progress[-1]["step"], progress[-1]["steps"]) == (600 - 265, 600 - 265)


def test_the_tokenizer_depends_on_nothing_but_recipe_and_text(tmp_path: Path, text: Path) -> None:
    config = tokenizer.Config(vocab_size=400, max_chars=5000, doc_cap=300)
    first = run(tokenizer, config, tmp_path / "base", text=text)[1]
    again = run(tokenizer, config, tmp_path / "base", text=text)[1]
    other = run(tokenizer, config.model_copy(update={"max_chars": 2000}), tmp_path / "base", text=text)[1]
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]


def test_documents_and_their_sum_are_capped() -> None:
    assert list(capped(["abcdef", "gh", "ijkl", "m"], doc_cap=4, max_chars=8)) == ["abcd", "gh", "ij"]
    assert list(capped(["ab"], doc_cap=4, max_chars=8)) == ["ab"]


def test_a_vocabulary_too_small_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 265"):
        tokenizer.Config(vocab_size=264)


def test_tokenizer_eval_measures_seven_kinds_and_says_who_is_missing(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_OFFLINE", "1")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setattr("tiktoken.load.read_file", tiktoken.load.read_file)  # put back after the test
    trained, _ = run(tokenizer, tokenizer.Config(vocab_size=600), tmp_path / "base", text=text)
    path, metrics = run(
        tokenizer_eval, tokenizer_eval.Config(), tmp_path / "base", text=text, tokenizer=trained
    )
    kinds = ["news", "korean", "code", "maths", "science", "train", "validation"]
    assert [kind for kind in metrics if "/" not in kind] == kinds
    news = SAMPLES["news"]
    assert metrics["news"] == len(news.encode()) / len(load_tokenizer(trained).encode(news))
    assert metrics["gpt2/news"] is None
    assert "NANOCHAT_OFFLINE is set" in metrics["cl100k/missing"]
    table = (path / "tokenizer_eval.md").read_text()
    assert table.count("missing |") == 2 * len(kinds)
    assert "gpt2 is missing: gpt2 could not be loaded: NANOCHAT_OFFLINE is set" in table
    assert json.loads((path / "tokenizer_eval.json").read_text())["vocab_size"] == {"ours": 600}


def test_a_peer_that_tiktoken_has_stands_beside_ours(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, _ = run(tokenizer, tokenizer.Config(vocab_size=600), tmp_path / "base", text=text)
    peer = load_tokenizer(trained).to_tiktoken()
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {"gpt2": peer, "cl100k_base": peer})
    path, metrics = run(
        tokenizer_eval,
        tokenizer_eval.Config(sample_chars=100),
        tmp_path / "base",
        text=text,
        tokenizer=trained,
    )
    assert metrics["gpt2/korean"] == metrics["cl100k/korean"] == metrics["korean"]
    assert "missing" not in (path / "tokenizer_eval.md").read_text()
    assert json.loads((path / "tokenizer_eval.json").read_text())["bytes"]["train"] == len(
        TRAIN[0][:100].encode()
    )
