"""Conversations into rows of T + 1 tokens: whole ones, best fit, padded at the end; no row is without
something to learn."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch

from nanochat_core.data.batch import Batch
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.render import Conversation, render_conversation

BUFFER_CONVERSATIONS = 200  # to choose from


class Conversations(Protocol):
    """Numbered conversations in their final order, as a mixture gives them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Conversation: ...


class _Rendered(NamedTuple):
    length: int
    number: int  # counts on over the epochs
    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class ConversationCursor:
    """The next conversation to read, and those read but not yet used."""

    next: int
    buffer: tuple[_Rendered, ...]

    def __call__(self) -> dict[str, Any]:
        return {"next": self.next, "buffer": [item.number for item in self.buffer]}


def packed_conversations(
    conversations: Conversations,
    tokenizer: Tokenizer,
    *,
    rows: int,
    T: int,
    loss_on: Literal["assistant", "all"],
    cursor: dict[str, Any],
    rank: int = 0,
    size: int = 1,
    epochs: int | None = None,
) -> Iterator[Batch]:
    """Batches of `rows` x T that follow `cursor` ({} is the beginning). Rank r of n reads every n-th
    conversation."""
    n = len(conversations)
    if n < size:
        raise ValueError(f"{size} ranks cannot share {n} conversations; use fewer ranks or a larger mixture")
    last = None if epochs is None else epochs * n
    if "ranks" in cursor:  # another number of ranks: what they had not used is dealt out anew
        places = [(one.get("next", r), one.get("buffer", [])) for r, one in enumerate(cursor["ranks"])]
        furthest = max(place for place, _ in places)
        unused = [number for _, held in places for number in held]
        end = furthest if last is None else min(furthest, last)
        unused += [number for place, _ in places for number in range(place, end, len(places))]
        cursor = {"next": furthest + rank, "buffer": sorted(unused)[rank::size]}
    following: int = cursor.get("next", rank)
    buffer: list[_Rendered] = []

    def read(number: int) -> None:
        ids, mask = render_conversation(tokenizer, conversations[number % n], max_tokens=T + 1)
        if loss_on == "all":
            mask = [1] * len(ids)
        if any(mask[1:]):  # a conversation cut before its first answer teaches nothing
            bisect.insort(buffer, _Rendered(len(ids), number, ids, mask), key=lambda item: item[:2])

    for number in cursor.get("buffer", []):
        read(number)
    barren = 0
    while True:
        inputs = torch.full((rows, T), tokenizer.bos, dtype=torch.long)
        targets = torch.full((rows, T), -1, dtype=torch.long)
        filled = 0
        for r in range(rows):
            at = 0
            while at <= T:
                while len(buffer) < BUFFER_CONVERSATIONS and (last is None or following < last):
                    before = len(buffer)
                    read(following)
                    following += size
                    barren = 0 if len(buffer) > before else barren + size
                    if barren > n:
                        raise ValueError(
                            f"no conversation has an answer within {T} tokens; raise sequence_len"
                        )
                fits = bisect.bisect_right(buffer, T + 1 - at, key=lambda item: item.length)
                if not fits:
                    break
                item = buffer.pop(fits - 1)
                ids = torch.tensor(item.ids)
                end = min(at + item.length, T)
                inputs[r, at:end] = ids[: end - at]
                learned = torch.where(torch.tensor(item.mask) > 0, ids, -1)[1:]
                targets[r, at : at + item.length - 1] = learned
                at += item.length
            if at == 0:
                break  # the last epoch's end
            filled += 1
        if not filled:
            return
        active = (targets >= 0).float()
        yield Batch(
            inputs, targets, active, float(active.sum()), ConversationCursor(following, tuple(buffer))
        )


def tokens_per_epoch(conversations: Conversations, tokenizer: Tokenizer, T: int, sample: int = 2000) -> float:
    """How many tokens one epoch holds, estimated from evenly spaced conversations."""
    n = len(conversations)
    stride = max(1, n // sample)
    lengths = [
        len(render_conversation(tokenizer, conversations[i], max_tokens=T + 1).ids)
        for i in range(0, n, stride)
    ]
    return sum(lengths) / len(lengths) * n
