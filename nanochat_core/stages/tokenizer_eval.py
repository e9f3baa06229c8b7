"""Bytes per token on seven kinds of text, beside GPT-2's and GPT-4's tokenizers where tiktoken has them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from nanochat_core.artifacts.stage import Job, Metrics, Recipe

if TYPE_CHECKING:
    import tiktoken

PEERS = {"gpt2": "gpt2", "cl100k": "cl100k_base"}  # GPT-2's and GPT-4's, as tiktoken calls them
TIMEOUT = 10.0  # seconds without an answer before a peer's vocabulary counts as out of reach

Encode = Callable[[str], list[int]]


class Config(Recipe):
    sample_chars: int = Field(
        1_000_000, ge=1
    )  # of the train and validation text; the third digit has settled


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Measure, and write the table as tokenizer_eval.md and .json."""
    from nanochat_core.artifacts.store import write_json, write_whole
    from nanochat_core.sources.documents import texts
    from nanochat_core.sources.download import offline
    from nanochat_core.tokenizer.bpe import load_tokenizer
    from nanochat_core.tokenizer.samples import SAMPLES

    tokenizer = load_tokenizer(job.inputs["tokenizer"])
    kinds = {kind: [text] for kind, text in SAMPLES.items()}
    kinds["train"] = list(beginning(texts(job.inputs["text"], "train"), cfg.sample_chars))
    kinds["validation"] = list(beginning(texts(job.inputs["text"], "validation"), cfg.sample_chars))

    encoders: dict[str, Encode] = {"ours": tokenizer.encode}
    vocab_sizes = {"ours": tokenizer.vocab_size}
    missing: dict[str, str] = {}
    for peer, name in PEERS.items():
        encoding = tiktoken_encoding(name, offline=offline())
        if isinstance(encoding, str):
            missing[peer] = encoding
        else:
            encoders[peer], vocab_sizes[peer] = encoding.encode_ordinary, encoding.n_vocab

    ratios: dict[str, dict[str, float | None]] = {}
    for step, (kind, documents) in enumerate(kinds.items(), start=1):
        ratios[kind] = {
            peer: bytes_per_token(encoders[peer], documents) if peer in encoders else None
            for peer in ("ours", *PEERS)
        }
        job.record(step=step, steps=len(kinds))
    sizes = {kind: sum(len(text.encode()) for text in documents) for kind, documents in kinds.items()}
    write_json(
        job.path / "tokenizer_eval.json",
        {"bytes_per_token": ratios, "bytes": sizes, "vocab_size": vocab_sizes, "missing": missing},
    )
    write_whole(job.path / "tokenizer_eval.md", table(ratios, sizes, missing))
    metrics: Metrics = {
        (kind if peer == "ours" else f"{peer}/{kind}"): ratio
        for kind, row in ratios.items()
        for peer, ratio in row.items()
    }
    return metrics | {f"{peer}/missing": reason for peer, reason in missing.items()}


def beginning(texts: Iterable[str], chars: int) -> Iterator[str]:
    """The first so many characters of the texts together."""
    for text in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return


def bytes_per_token(encode: Encode, texts: Iterable[str]) -> float | None:
    """How many bytes of text an id stands for on average; None of no text."""
    sizes = [(len(text.encode()), len(encode(text))) for text in texts]
    tokens = sum(count for _, count in sizes)
    return sum(size for size, _ in sizes) / tokens if tokens else None


def tiktoken_encoding(name: str, *, offline: bool) -> "tiktoken.Encoding | str":
    """An encoding from tiktoken's cache or, unless offline, its source; a sentence if it cannot be had."""
    import urllib.request
    from http.client import HTTPException

    import tiktoken
    import tiktoken.load

    def fetch(blobpath: str) -> bytes:
        if not blobpath.startswith("https://"):
            return Path(blobpath).read_bytes()
        if offline:
            raise OSError("NANOCHAT_OFFLINE is set and tiktoken has no copy of it")
        with urllib.request.urlopen(blobpath, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
        return content

    tiktoken.load.read_file = fetch  # tiktoken's own waits for an answer as long as it takes
    try:
        return tiktoken.get_encoding(name)
    except (OSError, HTTPException, ValueError) as error:  # ValueError: what came is not what its hash says
        return f"{name} could not be loaded: {error}"


def table(ratios: dict[str, dict[str, float | None]], sizes: dict[str, int], missing: dict[str, str]) -> str:
    """The measurements in Markdown, with the reason below for each peer that is missing."""
    lines = ["| bytes per token | size | ours | GPT-2 | GPT-4 (cl100k) |", "|---|---:|---:|---:|---:|"]
    for kind, row in ratios.items():
        cells = ["missing" if ratio is None else f"{ratio:.2f}" for ratio in row.values()]
        lines.append(f"| {kind} | {sizes[kind]:,} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{peer} is missing: {reason}" for peer, reason in missing.items()), ""])
