"""Training and encoding speed of our tokenizer beside rustbpe 0.1.0, tokenizers, bpeasy and tiktoken.

    uv run --group bench python benchmarks/tokenizer.py [--text FILE_OR_FOLDER] [--json]

Every measurement is a process of its own on the same documents, vocabulary and number of threads; the
peers take turns, and a ratio is the median over the rounds, so that what else the machine does falls on
all alike. Ids are counted when they are Python lists; a document's, or a batch's, are dropped before the
next, as a loader does. Memory is what a process needs beyond the documents themselves (Linux only).
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

PIECE = 10_000  # characters a document, the tokenizer stage's doc_cap
BATCH = 1024  # documents handed over at a time, a row group of the shards
TEXT_FILES = {".py", ".md", ".rst", ".txt", ".html", ".json", ".jsonl"}
Ids = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text", type=Path, help="a file or a folder (default: English from installed packages)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32_768, help="256 bytes and merges, without specials"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(NAMES), default=list(NAMES), help="leave peers out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, name = args.child.split(":")
        print(json.dumps(MEASUREMENTS[kind](name, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.work = Path(folder)
        run(args)


def run(args: argparse.Namespace) -> None:
    """All measurements in rounds, the table, and the line of JSON."""
    documents = [*(from_path(args.text) if args.text else installed_english())]
    (args.work / "documents.json").write_text(json.dumps(documents))
    size = sum(len(document.encode()) for document in documents)
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB; vocabulary {args.vocab_size:,}, "
          f"{args.threads} threads, {args.rounds} rounds")  # fmt: skip
    names = [name for name in NAMES if name in args.only and find_spec(NAMES[name])]
    for name in set(args.only) - set(names):
        print(f"{name} is not installed and left out; `uv sync --group bench` installs it")

    plan = [("train", name) for name in names if name != "tiktoken"]
    plan += [(kind, name) for kind in ("encode", "encode_batch") for name in names if name != "bpeasy"]
    plan = [step for step in plan if step != ("encode_batch", "rustbpe")]
    results: dict[tuple[str, str], list[dict[str, Any]]] = {step: [] for step in plan}
    for index in range(args.rounds):
        for step in plan if index % 2 == 0 else [*plan[:1], *reversed(plan[1:])]:  # merges are needed first
            results[step].append(measure(*step, args))

    rows = {step: summary(step, runs, results, size) for step, runs in results.items()}
    print(table(rows))
    if args.json:
        print(json.dumps(verdict(rows, results, size, args)))


def measure(kind: str, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own."""
    options = [
        "--child",
        f"{kind}:{name}",
        "--work",
        args.work,
        "--threads",
        args.threads,
        "--vocab-size",
        args.vocab_size,
    ]
    threads = "1" if kind == "encode" else str(args.threads)
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, __file__, *map(str, options)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


# -- measurements, each in its own process -----------------------------------------------------------------


def train(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train on all documents; the tokens in order tell whether two trainers agree."""
    documents = load(args.work)
    trainer = TRAINERS[name]
    before = reset_peak()
    start = time.perf_counter()
    trained = trainer(documents, args.vocab_size, args.threads)
    seconds = time.perf_counter() - start
    memory = peak() - before if before else None
    tokens = TOKENS[name](trained)
    if name == "ours":
        (args.work / "merges.json").write_text(json.dumps(trained))
    return {"seconds": seconds, "memory": memory, "digest": digest(tokens), "tokens": len(tokens)}


def encode(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Encode the documents one by one on one thread."""
    documents = load(args.work)
    encode_one = ENCODERS[name](args)
    return encoding(documents, lambda: map(encode_one, documents))


def encode_batch(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Encode the documents in batches on all threads; ours on one too, to see what the others bring."""
    documents = load(args.work)
    batches = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)]
    found: dict[str, Any] = {}
    for threads in (1, args.threads) if name == "ours" else (args.threads,):
        encode_all = BATCH_ENCODERS[name](args, threads)
        found = encoding(documents, lambda: chain.from_iterable(map(encode_all, batches))) | {  # noqa: B023
            "alone": found.get("seconds")
        }
    return found


def encoding(documents: list[str], ids: Callable[[], Iterable[list[int]]]) -> dict[str, Any]:
    """Time and memory to make all ids, and, apart from that, what they are."""
    before = reset_peak()
    start = time.perf_counter()
    tokens = sum(map(len, ids()))
    seconds = time.perf_counter() - start
    memory = peak() - before if before else None
    return {"seconds": seconds, "memory": memory, "digest": digest(ids()), "tokens": tokens}


MEASUREMENTS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "train": train,
    "encode": encode,
    "encode_batch": encode_batch,
}


def load(work: Path) -> list[str]:
    documents: list[str] = json.loads((work / "documents.json").read_text())
    return documents


def digest(value: Iterable[Any]) -> str:
    sha = hashlib.sha256()
    for item in value:
        sha.update(repr(item).encode())
    return sha.hexdigest()[:16]


def reset_peak() -> int | None:
    """Resident bytes now, with the peak set back to them; None where the system cannot say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# -- the peers ---------------------------------------------------------------------------------------------

NAMES = {  # what it is called -> its module
    "ours": "nanochat_bpe",
    "rustbpe": "rustbpe",
    "tokenizers": "tokenizers",
    "bpeasy": "bpeasy",
    "tiktoken": "tiktoken",
}


def train_ours(documents: list[str], vocab_size: int, threads: int) -> list[tuple[int, int]]:
    import nanochat_bpe

    return nanochat_bpe.train(documents, vocab_size, threads=threads)


def train_rustbpe(documents: list[str], vocab_size: int, threads: int) -> Any:
    from nanochat_bpe import PATTERN

    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(documents, vocab_size, pattern=PATTERN)
    return tokenizer


def train_tokenizers(documents: list[str], vocab_size: int, threads: int) -> Any:
    from nanochat_bpe import PATTERN
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        documents, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def train_bpeasy(documents: list[str], vocab_size: int, threads: int) -> Any:
    import bpeasy
    from nanochat_bpe import PATTERN

    return bpeasy.train_bpe(iter(documents), PATTERN, 128, vocab_size)


TRAINERS: dict[str, Callable[[list[str], int, int], Any]] = {
    "ours": train_ours,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "bpeasy": train_bpeasy,
}


def tokens_ours(merges: list[tuple[int, int]]) -> list[bytes]:
    import nanochat_bpe

    return nanochat_bpe.Encoder(merges).tokens()


TOKENS: dict[str, Callable[[Any], list[Any]]] = {
    "ours": tokens_ours,
    "rustbpe": lambda tokenizer: [bytes(token) for token, _ in tokenizer.get_mergeable_ranks()],
    "tokenizers": lambda tokenizer: sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get),
    "bpeasy": lambda ranks: sorted(ranks, key=ranks.get),
}


def our_tokenizer(args: argparse.Namespace) -> Any:
    from nanochat_core.tokenizer.bpe import Tokenizer

    return Tokenizer([(a, b) for a, b in json.loads((args.work / "merges.json").read_text())])


def huggingface(args: argparse.Namespace) -> Any:
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        our_tokenizer(args).to_huggingface(Path(folder))
        return Tokenizer.from_file(f"{folder}/tokenizer.json")


def encoder_huggingface(args: argparse.Namespace) -> Callable[[str], list[int]]:
    tokenizer = huggingface(args)
    return lambda text: tokenizer.encode(text).ids


def batch_encoder_huggingface(args: argparse.Namespace, threads: int) -> Callable[[list[str]], Ids]:
    tokenizer = huggingface(args)
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def batch_encoder_ours(args: argparse.Namespace, threads: int) -> Callable[[list[str]], Ids]:
    tokenizer = our_tokenizer(args)
    return lambda texts: tokenizer.encode_batch(texts, threads)


def batch_encoder_tiktoken(args: argparse.Namespace, threads: int) -> Callable[[list[str]], Ids]:
    encoding = our_tokenizer(args).to_tiktoken()
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=threads)


ENCODERS: dict[str, Callable[[argparse.Namespace], Callable[[str], list[int]]]] = {
    "ours": lambda args: our_tokenizer(args).encode,
    "rustbpe": lambda args: train_rustbpe(load(args.work), args.vocab_size, 1).encode,  # it cannot load
    "tokenizers": encoder_huggingface,
    "tiktoken": lambda args: our_tokenizer(args).to_tiktoken().encode_ordinary,
}
BATCH_ENCODERS: dict[str, Callable[[argparse.Namespace, int], Callable[[list[str]], Ids]]] = {
    "ours": batch_encoder_ours,
    "tokenizers": batch_encoder_huggingface,
    "tiktoken": batch_encoder_tiktoken,
}

# -- the text ----------------------------------------------------------------------------------------------


def installed_english() -> Iterator[str]:
    """The demo's corpus, Python's documentation and standard library, and the docs of installed packages."""
    from nanochat_core.sources.corpus import documents

    for document in documents():
        yield from pieces(document)
    paths = sysconfig.get_paths()
    for file in sorted(Path(paths["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            yield from pieces(file.read_text(encoding="utf-8", errors="replace"))
    for file in sorted(Path(paths["purelib"]).rglob("*")):
        if file.is_file() and (file.suffix in {".md", ".rst", ".txt"} or file.name == "METADATA"):
            yield from pieces(file.read_text(encoding="utf-8", errors="replace"))


def from_path(path: Path) -> Iterator[str]:
    """A text file, or every text file of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in TEXT_FILES)
    for file in files:
        yield from pieces(file.read_text(encoding="utf-8", errors="replace"))


def pieces(text: str) -> Iterator[str]:
    yield from (text[i : i + PIECE] for i in range(0, len(text), PIECE))


# -- the results -------------------------------------------------------------------------------------------


def summary(
    step: tuple[str, str],
    runs: list[dict[str, Any]],
    results: dict[tuple[str, str], list[dict[str, Any]]],
    size: int,
) -> dict[str, Any]:
    """Medians of a measurement; the ratio says how many times as fast ours was, round by round."""
    kind, _ = step
    memories = [run["memory"] for run in runs if run["memory"] is not None]
    ours = results.get((kind, "ours"), runs)
    ratios = [run["seconds"] / our["seconds"] for run, our in zip(runs, ours, strict=True)]
    speeds = [size / run["seconds"] / 1e6 for run in runs]
    return {
        "speed": statistics.median(speeds),
        "memory": statistics.median(memories) / 1e6 if memories else None,
        "ratio": statistics.median(ratios),
        "same": runs[0]["digest"] == ours[0]["digest"],
    }


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    titles = {"train": "train", "encode": "encode, 1 thread", "encode_batch": "encode, all threads"}
    lines = [
        "| what | who | MB/s | memory, MB | ours is faster by | same result |",
        "|---|---|---:|---:|---:|---|",
    ]
    for (kind, name), row in rows.items():
        memory = "" if row["memory"] is None else f"{row['memory']:.0f}"
        ratio = "" if name == "ours" else f"{row['ratio']:.1f}x"
        same = "" if name == "ours" else "yes" if row["same"] else "no"
        lines.append(f"| {titles[kind]} | {name} | {row['speed']:.1f} | {memory} | {ratio} | {same} |")
    return "\n".join(lines)


def verdict(
    rows: dict[tuple[str, str], dict[str, Any]],
    results: dict[tuple[str, str], list[dict[str, Any]]],
    size: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The numbers that are quoted; null where a peer is missing."""

    def of(kind: str, name: str, key: str) -> Any:
        return rows[kind, name][key] if (kind, name) in rows else None

    scaling = [run["alone"] / run["seconds"] for run in results.get(("encode_batch", "ours"), [])]
    return {
        "mb": size / 1e6,
        "vocab_size": args.vocab_size,
        "threads": args.threads,
        "rounds": args.rounds,
        "identical_merges": of("train", "rustbpe", "same"),
        "identical_ids": of("encode", "tiktoken", "same"),
        "train_ratio_rustbpe": of("train", "rustbpe", "ratio"),
        "train_ratio_tokenizers": of("train", "tokenizers", "ratio"),
        "train_ratio_bpeasy": of("train", "bpeasy", "ratio"),
        "encode_ratio_tiktoken": of("encode", "tiktoken", "ratio"),
        "encode_ratio_rustbpe": of("encode", "rustbpe", "ratio"),
        "encode_ratio_tokenizers": of("encode", "tokenizers", "ratio"),
        "encode_batch_ratio_tiktoken": of("encode_batch", "tiktoken", "ratio"),
        "encode_scaling": statistics.median(scaling) if scaling else None,
        "train_mb_s": of("train", "ours", "speed"),
        "encode_mb_s": of("encode", "ours", "speed"),
        "train_memory_mb": of("train", "ours", "memory"),
        "train_memory_mb_rustbpe": of("train", "rustbpe", "memory"),
    }


if __name__ == "__main__":
    main()
