"""Documents into rows of T + 1 tokens, each row beginning with <|bos|>, nothing lost and nothing padded.

Best fit: a row takes the longest document that still fits; when none does, it is filled with the beginning of
the longest one and the rest goes back, with a <|bos|> of its own. Upstream drops those rests: about 35 % of
the tokens at T = 2048.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat_core.data.batch import Batch
from nanochat_core.data.documents import Reader, Shard
from nanochat_core.tokenizer.bpe import Tokenizer

BUFFER_DOCS = 1000  # documents to choose from


class Piece(NamedTuple):
    """A document, or what is left of one, in the buffer; ordered by length, then by arrival."""

    length: int  # with its <|bos|>
    arrival: int
    place: tuple[int, int, int, int]  # shard, row group, row, tokens of the document already used
    tokens: np.ndarray[Any, np.dtype[np.int64]]


def packed(
    shards: Sequence[Shard],
    tokenizer: Tokenizer,
    *,
    rows: int,
    T: int,
    cursor: dict[str, Any],
    rank: int = 0,
    size: int = 1,
    epochs: int | None = None,
    buffer_docs: int = BUFFER_DOCS,
) -> Iterator[Batch]:
    """Batches of `rows` x T that follow `cursor` ({} is the beginning), for ever or for so many epochs.

    Rank r of n reads every n-th document. The cursor is exact: what follows it does not depend on where a run
    was interrupted.
    """
    stream = _Stream(shards, tokenizer, cursor, rank, size, epochs, buffer_docs)
    while True:
        block = np.empty((rows, T + 1), dtype=np.int64)
        for r in range(rows):
            if not stream.fill(block[r]):
                return  # the last epoch's end; an incomplete batch is not handed out
        tokens = torch.from_numpy(block)
        targets = tokens[:, 1:].contiguous()
        yield Batch(
            tokens[:, :-1].contiguous(),
            targets,
            torch.ones(targets.shape, dtype=torch.float32),
            float(targets.numel()),
            stream.cursor(),
        )


class _Stream:
    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: Tokenizer,
        cursor: dict[str, Any],
        rank: int,
        size: int,
        epochs: int | None,
        buffer_docs: int,
    ) -> None:
        if not shards or not sum(shard.rows for shard in shards):
            raise ValueError("the shards hold no documents to train on")
        if sum(shard.rows for shard in shards) < size:
            raise ValueError(
                f"{size} ranks cannot share {sum(s.rows for s in shards)} documents; "
                "use fewer, or more shards"
            )
        self.shards, self.tokenizer, self.rank, self.size = shards, tokenizer, rank, size
        self.epochs, self.buffer_docs = epochs, buffer_docs
        self.reader = Reader()
        self.first_row = np.concatenate([[0], np.cumsum([shard.rows for shard in shards])])
        self.epoch, self.shard, self.group, self.row = cursor.get("next", (0, 0, 0, 0))
        self.arrivals: int = cursor.get("arrivals", 0)
        self._cache: tuple[tuple[int, int], list[np.ndarray[Any, np.dtype[np.int64]]]] | None = None
        self.buffer: list[Piece] = []
        for arrival, *place in cursor.get("buffer", []):
            shard, group, row, used = place
            tokens = self._tokens(shard, group)[row][used:]
            self._put(arrival, (shard, group, row, used), tokens)

    # Reading.

    def _tokens(self, shard: int, group: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """All documents of a row group as token arrays; the last group read is kept, for resuming asks in
        order."""
        if self._cache is None or self._cache[0] != (shard, group):
            texts = self.reader.row_group(self.shards[shard], group)
            ids = self.tokenizer.encode_batch(texts)
            self._cache = ((shard, group), [np.asarray(document, dtype=np.int64) for document in ids])
        return self._cache[1]

    def _read_group(self) -> bool:
        """Put this rank's documents of the next row group into the buffer; False after the last epoch."""
        if self.epochs is not None and self.epoch >= self.epochs:
            return False
        documents = self._tokens(self.shard, self.group)
        for row, tokens in enumerate(documents):
            if (self.row + row) % self.size == self.rank and len(tokens):
                self._put(self.arrivals, (self.shard, self.group, row, 0), tokens)
                self.arrivals += 1
        self.row += len(documents)
        self.group += 1
        while self.group >= self.shards[self.shard].row_groups:
            self.shard, self.group = self.shard + 1, 0
            if self.shard == len(self.shards):
                self.epoch, self.shard, self.row = self.epoch + 1, 0, 0
                break
        return True

    def _put(self, arrival: int, place: tuple[int, int, int, int], tokens: np.ndarray[Any, Any]) -> None:
        bisect.insort(self.buffer, Piece(len(tokens) + 1, arrival, place, tokens), key=lambda p: p[:2])

    # Packing.

    def fill(self, row: np.ndarray[Any, np.dtype[np.int64]]) -> bool:
        """Fill one row with pieces; False if the data ends first."""
        at = 0
        while at < len(row):
            while len(self.buffer) < self.buffer_docs and self._read_group():
                pass
            if not self.buffer:
                return False
            room = len(row) - at
            fits = bisect.bisect_right(self.buffer, room, key=lambda p: p.length)
            piece = self.buffer.pop(fits - 1 if fits else -1)
            used = min(room, piece.length)
            row[at] = self.tokenizer.bos
            row[at + 1 : at + used] = piece.tokens[: used - 1]
            at += used
            if used < piece.length:
                shard, group, doc, before = piece.place
                self._put(
                    piece.arrival, (shard, group, doc, before + max(0, used - 1)), piece.tokens[used - 1 :]
                )
        return True

    def cursor(self) -> "Cursor":
        return Cursor((self.epoch, self.shard, self.group, self.row), self.arrivals, tuple(self.buffer))


@dataclass(frozen=True)
class Cursor:
    """A snapshot of the packer; its JSON names the buffered documents instead of holding their text."""

    next: tuple[int, int, int, int]
    arrivals: int
    buffer: tuple[Piece, ...]

    def __call__(self) -> dict[str, Any]:
        in_reading_order = sorted(self.buffer, key=lambda p: p.place)
        return {
            "next": list(self.next),
            "arrivals": self.arrivals,
            "buffer": [[piece.arrival, *piece.place] for piece in in_reading_order],
        }
