"""Byte pair encoding: learns merges from text, and turns text into ids and back."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, final

PATTERN: str
"""nanochat's split pattern, GPT-4's with numbers in groups of one or two digits."""

Progress = Callable[[Literal["read", "merge"], int, int | None], object]
"""Called as ("read", bytes so far, None), then as ("merge", merges so far, merges wanted)."""

def train(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pattern: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[tuple[int, int]]:
    """Merges in the order learned; merge i makes id 256 + i. Fewer than asked when the text gives no more."""

@final
class Splitter:
    """What cuts text into words; with `regex`, by the regular expression even for PATTERN."""

    def __new__(cls, pattern: str | None = None, *, regex: bool = False) -> Splitter: ...
    def split(self, text: str) -> list[str]: ...

@final
class Encoder:
    """Merges, ready for use; special tokens take the ids that follow and never come out of text."""

    def __new__(
        cls,
        merges: Sequence[tuple[int, int]],
        specials: Sequence[str] = ...,
        pattern: str | None = None,
    ) -> Encoder: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Iterable[str], threads: int | None = None) -> list[list[int]]: ...
    def decode(self, ids: Sequence[int]) -> bytes: ...
    def tokens(self) -> list[bytes]: ...
