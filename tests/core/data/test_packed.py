"""Packing: nothing lost, every row begun by <|bos|>, and a cursor that continues exactly."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core.data.batch import Batch, ahead
from nanochat_core.data.documents import Shard
from nanochat_core.data.packed import packed
from nanochat_core.store import sha256
from nanochat_core.tokenizer.bpe import Tokenizer, train

T = 16


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(["a quick brown fox jumps over a lazy dog " * 5], 280)


def shard(folder: Path, name: str, documents: list[str], group: int) -> Shard:
    path = folder / name
    pq.write_table(pa.table({"text": pa.array(documents, pa.string())}), path, row_group_size=group)
    return Shard(name, path, 0, sha256(path), len(documents), pq.ParquetFile(path).num_row_groups)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[Shard]:
    folder = tmp_path_factory.mktemp("shards")
    documents = [f"{i} fox " * (1 + i * 7 % 23) for i in range(60)]
    return [shard(folder, "a.parquet", documents[:35], 8), shard(folder, "b.parquet", documents[35:], 10)]


def rows(batches: list[Batch]) -> torch.Tensor:
    """(rows, T + 1) as they were packed."""
    return torch.cat([torch.cat((b.inputs, b.targets[:, -1:]), dim=1) for b in batches])


def take(shards: list[Shard], tokenizer: Tokenizer, n: int, **options: object) -> list[Batch]:
    settings: dict[str, object] = {"cursor": {}, "rows": 2, "T": T, "buffer_docs": 10} | options
    stream = packed(shards, tokenizer, **settings)  # type: ignore[arg-type]
    return [batch for batch, _ in zip(stream, range(n), strict=False)]


def test_an_epoch_holds_every_token_of_every_document_once(shards: list[Shard], tokenizer: Tokenizer) -> None:
    found = rows(take(shards, tokenizer, 10_000, rows=1, epochs=1)).flatten()
    words: dict[int, int] = {}
    for s in shards:
        for text in pq.read_table(s.path).column("text").to_pylist():
            for token in tokenizer.encode(text):
                words[token] = words.get(token, 0) + 1
    counted = {t: int((found == t).sum()) for t in words}
    lost = sum(words.values()) - sum(counted.values())
    assert 0 <= lost <= T  # the last row of an epoch is not handed out half full
    assert all(counted[t] <= words[t] for t in words)


def test_every_row_begins_with_bos(shards: list[Shard], tokenizer: Tokenizer) -> None:
    assert (rows(take(shards, tokenizer, 50))[:, 0] == tokenizer.bos).all()


def test_targets_are_the_inputs_one_later(shards: list[Shard], tokenizer: Tokenizer) -> None:
    for batch in take(shards, tokenizer, 5):
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert batch.count == batch.targets.numel()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 60), size=st.integers(1, 3))
def test_a_cursor_continues_exactly(at: int, size: int, shards: list[Shard], tokenizer: Tokenizer) -> None:
    """At any batch, into later epochs, on any rank; through JSON as a checkpoint stores it."""
    straight = take(shards, tokenizer, at + 5, rank=size - 1, size=size)
    cursor = json.loads(json.dumps(straight[at - 1].cursor())) if at else {}
    resumed = take(shards, tokenizer, 5, rank=size - 1, size=size, cursor=cursor)
    for a, b in zip(straight[at:], resumed, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        assert a.cursor() == b.cursor()


def test_ranks_share_the_documents_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [f"{chr(97 + i)}" * 40 for i in range(20)]
    only = [shard(tmp_path, "x.parquet", documents, 7)]
    seen = [
        tokenizer.decode(
            rows(take(only, tokenizer, 100, rows=1, epochs=1, rank=r, size=2)).flatten().tolist()
        )
        for r in range(2)
    ]
    letters = [{c for c in text if c.islower() and c not in "bos"} for text in seen]
    assert not letters[0] & letters[1]


def test_a_short_corpus_means_more_epochs_and_never_a_hang(tmp_path: Path, tokenizer: Tokenizer) -> None:
    only = [shard(tmp_path, "x.parquet", ["fox"], 1)]
    assert len(take(only, tokenizer, 20)) == 20


def test_no_documents_is_an_error_and_so_are_too_many_ranks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="hold no documents"):
        take([], tokenizer, 1)
    only = [shard(tmp_path, "x.parquet", ["fox", "dog"], 1)]
    with pytest.raises(ValueError, match="3 ranks cannot share 2 documents"):
        take(only, tokenizer, 1, size=3)


def test_reading_ahead_changes_nothing_and_hands_errors_on(shards: list[Shard], tokenizer: Tokenizer) -> None:
    straight = take(shards, tokenizer, 6)
    stream = ahead(packed(shards, tokenizer, rows=2, T=T, cursor={}, buffer_docs=10))
    for a in straight:
        b = next(stream)
        assert torch.equal(a.inputs, b.inputs) and a.cursor() == b.cursor()
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no documents"):
        next(ahead(packed([], tokenizer, rows=1, T=T, cursor={})))
