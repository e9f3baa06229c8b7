"""Batches for a script: a text or a task in memory, packed as the stages pack theirs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from nanochat_core.data.batch import Batch
from nanochat_core.data.conversations import Conversations, packed_conversations
from nanochat_core.data.packed import packed
from nanochat_core.sources.documents import Texts
from nanochat_core.tokenizer.bpe import Tokenizer

Stream = Callable[[dict[str, Any]], Iterator[Batch]]
"""Cursor -> the batches that follow it. {} is the beginning; the other cursors are those of the batches."""


def text_batches(documents: Sequence[str], tokenizer: Tokenizer, *, rows: int, T: int) -> Stream:
    """Endless batches of `rows` x T tokens of plain text, for next-token training.

    Every document begins with <|bos|>; long ones continue in another row. ValueError if none has text.
    """
    texts = Texts(tuple(text for text in documents if text and not text.isspace()))
    if not texts.documents:
        raise ValueError("there is no text to train on: all documents are empty")
    return lambda cursor: packed([texts], tokenizer, rows=rows, T=T, cursor=cursor)


def conversation_batches(
    conversations: Conversations,
    tokenizer: Tokenizer,
    *,
    rows: int,
    T: int,
    loss_on: Literal["assistant", "all"] = "assistant",
) -> Stream:
    """Endless batches of `rows` x T tokens of conversations: a task, a mixture, or a list.

    A conversation is never split over rows: its last exchanges are left out if it is longer than T. With
    `loss_on="assistant"` only the assistant's words and tool calls are learned.
    """
    if not len(conversations):
        raise ValueError("there are no conversations to train on")
    return lambda cursor: packed_conversations(
        conversations, tokenizer, rows=rows, T=T, loss_on=loss_on, cursor=cursor
    )
