"""Learn the vocabulary from the first documents of the training shards; the artefact is bpe.json."""

import statistics
import time
from collections.abc import Iterable, Iterator
from itertools import islice

from pydantic import Field

from nanochat_core.artifacts.stage import Job, Metrics, Recipe

SAMPLE = 200  # documents that must survive encoding and decoding, and that bytes_per_token is taken of


class Config(Recipe):
    vocab_size: int = Field(32_768, ge=265)  # with the 9 specials; upstream's sweep chose it over 65,536
    max_chars: int = Field(2_000_000_000, ge=1)  # upstream's speedrun; more moves no merge that matters
    doc_cap: int = Field(10_000, ge=1)  # characters of one document, so that a few huge ones do not rule


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Train, check that text comes back as it was, and save."""
    from nanochat_core.sources.documents import texts
    from nanochat_core.tokenizer.bpe import train

    def documents() -> Iterator[str]:
        return capped(texts(job.inputs["text"], "train"), cfg.doc_cap, cfg.max_chars)

    start = time.monotonic()
    tokenizer = train(
        documents(), cfg.vocab_size, threads=job.runtime.threads, progress=_Progress(job, cfg.vocab_size)
    )
    seconds = time.monotonic() - start
    if tokenizer.vocab_size < cfg.vocab_size:
        print(f"the text has no more pairs to merge: {tokenizer.vocab_size} ids instead of {cfg.vocab_size}")

    sample = list(islice(documents(), SAMPLE))
    ids = tokenizer.encode_batch(sample, job.runtime.threads)
    for text, encoded in zip(sample, ids, strict=True):
        assert tokenizer.decode_bytes(encoded) == text.encode(), "decoding must undo encoding"
    tokenizer.save(job.path)

    lengths = [length for length in tokenizer.token_bytes() if length]
    return {
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": sum(len(text.encode()) for text in sample) / sum(map(len, ids)),
        "seconds": round(seconds, 3),
        "token_bytes_mean": statistics.fmean(lengths),
        "token_bytes_max": max(lengths),
        "fingerprint": tokenizer.fingerprint,
    }


def capped(texts: Iterable[str], doc_cap: int, max_chars: int) -> Iterator[str]:
    """At most `doc_cap` characters of each text, and `max_chars` in all."""
    left = max_chars
    for text in texts:
        piece = text[: min(doc_cap, left)]
        yield piece
        left -= len(piece)
        if left <= 0:
            return


class _Progress:
    """Tells the job how far training is, about once a second."""

    def __init__(self, job: Job[Config], vocab_size: int) -> None:
        self.job, self.steps, self.last = job, vocab_size - 265, time.monotonic()
        self.read = 0

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        if phase == "read":
            self.read = done
        if time.monotonic() - self.last >= 1 or (phase == "merge" and done == total):
            self.last = time.monotonic()
            step = done if phase == "merge" else 0
            self.job.record(step=step, steps=self.steps, megabytes=self.read / 1e6)
