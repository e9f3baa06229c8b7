"""Packing: nothing lost, every row begun by <|bos|>, and a cursor that continues exactly."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat_core.artifacts.store import sha256
from nanochat_core.data.batch import Batch, ahead
from nanochat_core.data.packed import packed
from nanochat_core.sources.documents import Shard
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


@pytest.mark.parametrize(("per_batch", "size"), [(1, 1), (7, 1), (500, 1), (4, 2)])
def test_an_epoch_teaches_every_token_of_every_document_once(
    per_batch: int, size: int, shards: list[Shard], tokenizer: Tokenizer
) -> None:
    """Also where one batch is more than there is; what is filled up has that shape and counts for nothing."""
    found: dict[int, int] = {}
    for rank in range(size):
        for batch in take(shards, tokenizer, 10_000, rows=per_batch, epochs=1, rank=rank, size=size):
            assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (per_batch, T)
            assert torch.equal(batch.weights, (batch.targets >= 0).float())
            assert batch.count == batch.weights.sum() > 0
            for token in batch.targets[batch.targets >= 0].tolist():
                found[token] = found.get(token, 0) + 1
    found.pop(tokenizer.bos)
    words: dict[int, int] = {}
    for s in shards:
        for text in pq.read_table(s.path).column("text").to_pylist():
            for token in tokenizer.encode(text):
                words[token] = words.get(token, 0) + 1
    assert found == words


def slowly(documents: list[list[int]], bos: int, buffer_docs: int) -> list[list[int]]:
    """The rule of packing, in so many words, up to the row that the documents do not fill."""
    waiting, buffer, done = list(enumerate(documents)), list[tuple[int, list[int]]](), list[list[int]]()
    while True:
        row: list[int] = []
        while len(row) < T + 1:
            while waiting and len(buffer) < buffer_docs:
                buffer.append(waiting.pop(0))
            if not buffer:
                return done
            room = T + 1 - len(row)
            fitting = [piece for piece in buffer if len(piece[1]) + 1 <= room]
            arrival, tokens = (
                max(fitting, key=lambda piece: (len(piece[1]), piece[0])) if fitting else min(buffer)
            )
            buffer.remove((arrival, tokens))
            row += [bos, *tokens[: room - 1]]
            if not fitting:
                buffer.append((arrival, tokens[room - 1 :]))
        done.append(row)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), buffer_docs=st.integers(1, 12))
def test_rows_are_filled_by_the_longest_that_fits_or_else_the_oldest(
    lengths: list[int], buffer_docs: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = ["".join(chr(97 + (i + j) % 26) for j in range(n)) for i, n in enumerate(lengths)]
    one = [shard(tmp_path, "x.parquet", texts, 1)]
    found = rows(take(one, tokenizer, 10_000, rows=1, epochs=1, buffer_docs=buffer_docs)).tolist()
    expected = slowly([tokenizer.encode(text) for text in texts], tokenizer.bos, buffer_docs)
    assert found[: len(expected)] == expected and len(found) <= len(expected) + 1


def test_documents_much_longer_than_a_row_end_and_make_room(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Shaved down together, none would end before all do, and nothing new would come in until then."""
    texts = [f"{i} " + "jumps over a lazy dog " * 12 for i in range(200)]
    length = sum(len(tokenizer.encode(text)) for text in texts) / len(texts)
    assert length > 5 * T
    long = [shard(tmp_path, "x.parquet", texts, 1)]
    steps = [batch.cursor()["arrivals"] for batch in take(long, tokenizer, 100, rows=1, buffer_docs=50)]
    assert steps[-1] - 50 > 0.9 * 100 * T / length
    waits = [steps.count(arrivals) for arrivals in set(steps)]
    assert max(waits) < 2 * length / T  # rows between two arrivals


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


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("batches", [0, 3])
def test_another_number_of_ranks_goes_on_without_losing_or_repeating_a_token(
    before: int, after: int, batches: int, shards: list[Shard], tokenizer: Tokenizer
) -> None:
    def learned(found: list[Batch]) -> Counter[int]:
        return Counter(t for batch in found for t in batch.targets.flatten().tolist() if t >= 0)

    whole = learned(take(shards, tokenizer, 10_000, epochs=1))
    first = [take(shards, tokenizer, batches, epochs=1, rank=r, size=before) for r in range(before)]
    cursors = [json.loads(json.dumps(found[-1].cursor() if found else {})) for found in first]
    rest = [
        take(shards, tokenizer, 10_000, epochs=1, rank=r, size=after, cursor={"ranks": cursors})
        for r in range(after)
    ]
    parts = sum((learned(found) for found in first + rest), Counter[int]())
    del whole[tokenizer.bos], parts[tokenizer.bos]  # how often a document is cut differs
    assert parts == whole


def test_ranks_share_the_documents_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [f"{chr(97 + i)}" * 40 for i in range(20)]
    only = [shard(tmp_path, "x.parquet", documents, 7)]
    seen = [
        tokenizer.decode(rows(take(only, tokenizer, 12, rows=1, rank=r, size=2)).flatten().tolist())
        for r in range(2)
    ]
    letters = [{c for c in text if c.islower() and c not in "bos"} for text in seen]
    assert not letters[0] & letters[1]


def test_a_short_corpus_means_more_epochs_and_never_a_hang(tmp_path: Path, tokenizer: Tokenizer) -> None:
    only = [shard(tmp_path, "x.parquet", ["fox"], 1)]
    assert len(take(only, tokenizer, 20)) == 20


@pytest.mark.parametrize(("documents", "rank", "size"), [(["", "", ""], 0, 1), (["fox jumps", ""], 1, 2)])
def test_nothing_but_empty_documents_is_an_error_and_never_a_hang(
    documents: list[str], rank: int, size: int, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    only = [shard(tmp_path, "x.parquet", documents, 1)]
    with pytest.raises(ValueError, match=f"all documents of rank {rank} of {size} are empty"):
        take(only, tokenizer, 1, rank=rank, size=size)
    assert take(only, tokenizer, 1, rank=rank, size=size, epochs=1) == []


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
