"""Tokens lost in packing: ours, which puts remainders back, beside best-fit-crop, which drops them as
upstream does.

Both pack the same documents of the embedded corpus into rows of T + 1 with the same buffer. `lost` is the
share of tokens read that no row holds; `bos` the share of a row's tokens that only mark a beginning.

    uv run python benchmarks/packing.py [--json]
"""

import argparse
import bisect
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from nanochat_core.data.packed import BUFFER_DOCS, packed
from nanochat_core.sources import shard_sets
from nanochat_core.sources.documents import Shard, row_group
from nanochat_core.tokenizer.bpe import Tokenizer, train


def documents(files: Sequence[Shard]) -> Iterator[str]:
    for file in files:
        for group in range(file.row_groups):
            yield from row_group(file.path, group)


def best_fit_crop(lengths: Iterator[int], capacity: int) -> tuple[int, int, int]:
    """Rows filled by the longest document that fits, else by cropping the shortest: (rows, read, kept), in
    tokens with each document's <|bos|>, up to where the documents end."""
    buffer: list[int] = []
    read = kept = rows = 0
    while True:
        room = capacity
        while room:
            for length in islice(lengths, BUFFER_DOCS - len(buffer)):
                bisect.insort(buffer, length)
                read += length
            if len(buffer) < BUFFER_DOCS:
                return rows, read - sum(buffer), kept
            fits = bisect.bisect_right(buffer, room)
            taken = buffer.pop(fits - 1 if fits else 0)
            used = min(taken, room)
            room, kept = room - used, kept + used
        rows += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    summary: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = shard_sets.embedded(Path(folder)).train
        tokenizer = train(islice(documents(files), 2000), options.vocab_size)
        print(f"{'T':>6} {'crop: lost':>11} {'ours: lost':>11} {'crop: bos':>10} {'ours: bos':>10}")
        for T in (256, 512, 2048):
            row = summary[str(T)] = measure(files, tokenizer, T)
            lost = f"{row['crop_lost']:11.1%} {row['lost']:11.1%}"
            print(f"{T:6} {lost} {row['crop_bos']:10.2%} {row['bos']:10.2%}")
    if options.json:
        print(json.dumps(summary))


def measure(files: Sequence[Shard], tokenizer: Tokenizer, T: int) -> dict[str, float]:
    texts = list(documents(files))
    lengths = [1 + len(ids) for ids in tokenizer.encode_batch(texts)]
    rows, read, kept = best_fit_crop(iter(lengths), T + 1)
    crop_bos = len(lengths) * read / sum(lengths) / kept
    words = bos = 0
    for batch in packed(files, tokenizer, rows=1, T=T, cursor={}, epochs=1):
        count = 1 + int((batch.targets == tokenizer.bos).sum())  # one begins the row
        bos += count
        words += 1 + int(batch.count) - count
    there = sum(lengths) - len(lengths)  # the documents' own tokens
    return {
        "rows": rows,
        "crop_lost": 1 - kept / read,
        "crop_bos": crop_bos,
        "lost": 1 - words / there,
        "bos": bos / (bos + words),
    }


if __name__ == "__main__":
    main()
