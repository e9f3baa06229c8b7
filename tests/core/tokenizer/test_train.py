"""Merges: the same as the slow twin's and the registry's rustbpe, whatever the text."""

import gc
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import nanochat_bpe
import pytest
from awkward_texts import slow_merges, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_core.tokenizer.bpe import train


@settings(deadline=None, max_examples=60)
@given(texts, st.integers(256, 330))
def test_merges_equal_the_slow_twins(documents: list[str], vocab_size: int) -> None:
    if any(documents):
        assert nanochat_bpe.train(documents, vocab_size) == slow_merges(documents, vocab_size)


@settings(deadline=None, max_examples=100)
@given(texts, st.sampled_from([256, 257, 300, 1000]), st.integers(1, 3))
def test_merges_equal_rustbpes(documents: list[str], vocab_size: int, threads: int) -> None:
    rustbpe = pytest.importorskip("rustbpe")
    if any(documents):
        peer = rustbpe.Tokenizer()
        peer.train_from_iterator(documents, vocab_size, pattern=nanochat_bpe.PATTERN)
        theirs = [bytes(token) for token, _ in peer.get_mergeable_ranks()]
        merges = nanochat_bpe.train(documents, vocab_size, threads=threads)
        assert nanochat_bpe.Encoder(merges).tokens() == theirs


def test_ties_go_to_the_smallest_pair() -> None:
    assert nanochat_bpe.train(["zy", "ab", "ba"], 259) == [(97, 98), (98, 97), (122, 121)]


def test_overlapping_pairs_merge_from_the_left() -> None:
    assert nanochat_bpe.train(["aaaaa"], 300) == [(97, 97), (256, 97), (256, 257)]


def test_training_ends_when_no_pair_is_left() -> None:
    assert nanochat_bpe.train(["a", "b"], 1000) == []
    assert train(["ab"], 1000).vocab_size == 256 + 1 + 9


def test_the_number_of_threads_and_the_order_of_texts_do_not_matter() -> None:
    documents = [f"word{i % 97} and {i % 13}s, {'ab' * (i % 7)}\n" for i in range(2000)]
    merges = nanochat_bpe.train(documents, 400, threads=1)
    assert nanochat_bpe.train(reversed(documents), 400, threads=3) == merges


def test_a_stream_is_read_in_bounded_memory() -> None:
    alive = peak = 0

    class Document(str):  # counted while the trainer holds it
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def stream() -> Iterator[str]:
        nonlocal alive, peak
        for i in range(300):
            alive += 1
            peak = max(peak, alive)
            yield Document(f"text number {i} " * 4000)  # 64 KB; 19 MB together

    nanochat_bpe.train(stream(), 300)
    gc.collect()
    assert peak <= 2


def test_progress_counts_bytes_then_merges() -> None:
    calls: list[tuple[str, int, int | None]] = []
    nanochat_bpe.train(["hello hello"], 258, progress=lambda *call: calls.append(call))
    assert calls == [("read", 11, None), ("merge", 2, 2)]


def test_an_exception_of_the_progress_callback_ends_the_training() -> None:
    def progress(phase: str, done: int, total: int | None) -> None:
        raise RuntimeError(f"stop at {phase}")

    with pytest.raises(RuntimeError, match="stop at read"):
        nanochat_bpe.train(["hello"], 258, progress=progress)


def test_ctrl_c_interrupts_training() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "the same words again and again " * 1000

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell has it ignored
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            nanochat_bpe.train(endless(), 300)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 10


def raising() -> Iterator[str]:
    yield "fine"
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("documents", "error", "sentence"),
    [
        ([], ValueError, "the corpus is empty: there is no text to learn merges from"),
        (["", ""], ValueError, "the corpus is empty"),
        (["fine", b"bytes"], TypeError, "text 1 is of type bytes, not str"),
        (["fine", None], TypeError, "text 1 is of type NoneType, not str"),
        (["fine", "lone \ud800 surrogate"], ValueError, "text 1 has a lone surrogate at character 5"),
        (raising(), OSError, "the disk is gone"),
        ("one text", TypeError, "texts is one str; pass an iterable of str"),
        (17, TypeError, "'int' object is not iterable"),
    ],
)
def test_bad_texts_are_an_error(documents: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        train(documents, 300)


@pytest.mark.parametrize("vocab_size", [0, 255, 264])
def test_a_vocabulary_without_room_for_bytes_and_specials_is_an_error(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}; it must be at least 265"):
        train(["text"], vocab_size)


def test_a_vocabulary_without_room_for_bytes_is_an_error_of_the_crate_too() -> None:
    with pytest.raises(ValueError, match="vocab_size is 255; it must be at least 256"):
        nanochat_bpe.train(["text"], 255)
    with pytest.raises(ValueError, match="threads is 0"):
        nanochat_bpe.train(["text"], 300, threads=0)
