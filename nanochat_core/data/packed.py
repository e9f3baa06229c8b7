"""Documents into rows of T + 1 tokens, each row beginning with <|bos|>, nothing lost and nothing padded.

Best fit: a row takes the longest document that still fits; when none does, it is filled with the beginning of
the one that has waited longest, and the rest goes back, with a <|bos|> of its own. Upstream drops those
rests: about 35 % of the tokens at T = 2048. The oldest and not the longest, because shaving the longest makes
all of a buffer of long documents equally long: for hundreds of steps none of them ends and none comes in.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat_core.data.batch import Batch
from nanochat_core.sources.documents import Shard, ShardReader, Texts
from nanochat_core.tokenizer.bpe import Tokenizer

BUFFER_DOCS = 1000  # documents to choose from


class BufferedDocument(NamedTuple):
    """A document, or what is left of one, in the buffer."""

    length: int  # with its <|bos|>
    arrival: int
    place: tuple[int, int, int, int]  # shard, row group, row, tokens of the document already used
    tokens: np.ndarray[Any, np.dtype[np.int64]]


def packed(
    shards: Sequence[Shard | Texts],
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
    was interrupted, unless on another number of ranks: those divide what is left of the epoch anew. After so
    many epochs the last batch is filled up with targets of -1; the ranks may come to their ends at different
    batches.
    """
    if "ranks" in cursor:
        others = [
            _Stream(shards, tokenizer, one, r, len(cursor["ranks"]), epochs, buffer_docs)
            for r, one in enumerate(cursor["ranks"])
        ]
        cursor = divided(others, rank, size)
    stream = _Stream(shards, tokenizer, cursor, rank, size, epochs, buffer_docs)
    filled = T + 1
    while filled == T + 1:
        block = np.full((rows, T + 1), tokenizer.bos, dtype=np.int64)
        active = np.zeros((rows, T), dtype=bool)
        for r in range(rows):
            filled = stream.fill(block[r])
            active[r, : max(0, filled - 1)] = True
            if filled <= T:
                break  # the last epoch's end
        count = int(active.sum())
        if count:
            learned = torch.from_numpy(active)
            tokens = torch.from_numpy(block)
            targets = torch.where(learned, tokens[:, 1:], -1)
            yield Batch(tokens[:, :-1].contiguous(), targets, learned.float(), float(count), stream.cursor())


def by_length(piece: BufferedDocument) -> tuple[int, int]:
    return piece.length, piece.arrival


class _Stream:
    def __init__(
        self,
        shards: Sequence[Shard | Texts],
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
        self.reader = ShardReader()
        self.epoch, self.shard, self.group, self.row = cursor.get("next", (0, 0, 0, 0))
        self.arrivals: int = cursor.get("arrivals", 0)
        self._cache: tuple[tuple[int, int], list[np.ndarray[Any, np.dtype[np.int64]]]] | None = None
        self.barren = 0  # row groups read in a row that held nothing for this rank
        self.buffer: list[BufferedDocument] = []  # by length
        self.by_arrival: dict[int, BufferedDocument] = {}  # the same; a piece's rest keeps the piece's place
        found = []
        for arrival, *place in cursor.get("buffer", []):
            shard, group, row, used = place
            found.append((arrival, (shard, group, row, used), self._tokens(shard, group)[row][used:]))
        for piece in sorted(found, key=lambda piece: piece[0]):
            self._put(*piece)

    # Reading.

    def _tokens(self, shard: int, group: int) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """All documents of a row group as token arrays; the last group read is kept, for resuming asks in
        order."""
        if self._cache is None or self._cache[0] != (shard, group):
            texts = self.reader.row_group(self.shards[shard], group)
            ids = self.tokenizer.encode_batch(texts)
            self._cache = ((shard, group), [np.asarray(document, dtype=np.int64) for document in ids])
        return self._cache[1]

    def read_group(self) -> bool:
        """Put this rank's documents of the next row group into the buffer; False after the last epoch."""
        if self.epochs is not None and self.epoch >= self.epochs:
            return False
        documents = self._tokens(self.shard, self.group)
        before = self.arrivals
        for row, tokens in enumerate(documents):
            if (self.row + row) % self.size == self.rank and len(tokens):
                self._put(self.arrivals, (self.shard, self.group, row, 0), tokens)
                self.arrivals += 1
        self.barren = 0 if self.arrivals > before else self.barren + 1
        if self.barren > sum(shard.row_groups for shard in self.shards):
            raise ValueError(
                f"all documents of rank {self.rank} of {self.size} are empty; use fewer ranks, or more shards"
            )
        self.row += len(documents)
        self.group += 1
        while self.group >= self.shards[self.shard].row_groups:
            self.shard, self.group = self.shard + 1, 0
            if self.shard == len(self.shards):
                self.epoch, self.shard, self.row = self.epoch + 1, 0, 0
                break
        return True

    def at(self) -> tuple[int, int, int, int]:
        """The row group to read next."""
        return self.epoch, self.shard, self.group, self.row

    # Packing.

    def _put(self, arrival: int, place: tuple[int, int, int, int], tokens: np.ndarray[Any, Any]) -> None:
        piece = BufferedDocument(len(tokens) + 1, arrival, place, tokens)
        bisect.insort(self.buffer, piece, key=by_length)
        self.by_arrival[arrival] = piece

    def fill(self, row: np.ndarray[Any, np.dtype[np.int64]]) -> int:
        """Fill one row with pieces; how many tokens it has got, which is all unless the data ends first."""
        at = 0
        while at < len(row):
            while len(self.buffer) < self.buffer_docs and self.read_group():
                pass
            if not self.buffer:
                break
            room = len(row) - at
            fits = bisect.bisect_right(self.buffer, room, key=lambda p: p.length)
            if fits:
                piece = self.buffer.pop(fits - 1)
            else:
                oldest = next(iter(self.by_arrival.values()))
                piece = self.buffer.pop(bisect.bisect_left(self.buffer, oldest[:2], key=by_length))
            used = min(room, piece.length)
            row[at] = self.tokenizer.bos
            row[at + 1 : at + used] = piece.tokens[: used - 1]
            at += used
            if used < piece.length:
                shard, group, doc, before = piece.place
                self._put(piece.arrival, (shard, group, doc, before + used - 1), piece.tokens[used - 1 :])
            else:
                del self.by_arrival[piece.arrival]
        return at

    def cursor(self) -> "DocumentCursor":
        return DocumentCursor(self.at(), self.arrivals, tuple(self.buffer))


def divided(others: Sequence[_Stream], rank: int, size: int) -> dict[str, Any]:
    """Where rank r of n goes on after another number of ranks: all read up to where the furthest had got to,
    and what they hold is dealt out, oldest first."""
    furthest = max(stream.at() for stream in others)
    for stream in others:
        while stream.at() < furthest:
            stream.read_group()
    held = sorted((piece.arrival, r, piece.place) for r, s in enumerate(others) for piece in s.buffer)
    mine = [place for _, _, place in held[rank::size]]
    buffer = [[i, *place] for i, place in enumerate(mine)]
    return {"next": list(furthest), "arrivals": len(mine), "buffer": buffer}


@dataclass(frozen=True)
class DocumentCursor:
    """A snapshot of the packer; its JSON names the buffered documents instead of holding their text."""

    next: tuple[int, int, int, int]
    arrivals: int
    buffer: tuple[BufferedDocument, ...]

    def __call__(self) -> dict[str, Any]:
        in_reading_order = sorted(self.buffer, key=lambda p: p.place)
        return {
            "next": list(self.next),
            "arrivals": self.arrivals,
            "buffer": [[piece.arrival, *piece.place] for piece in in_reading_order],
        }
