"""The modern recipe against the seed's: validation bits per byte for training FLOPs, on the embedded corpus.

Each preset has its own optimizer settings as published, and the best of a few factors on all its rates, found
with the first random seed. The seed recipe trains for `--steps`; modern is given `--share` of its FLOPs and a
schedule of that length. A random seed is one of the weights and of the documents' order, the same for both
presets. The table gives means and spreads, then the mean of the paired differences (modern - seed) and their
spread; `reached` says whether that mean is at or below zero.

The presets take different numbers of steps, so they stop at different places of the same data: with one order
of the documents, what happens to come last would favour one of them.

    uv run python benchmarks/recipe.py [--steps 400] [--share 0.6] [--random-seeds 3] [--json]
"""

import argparse
import contextlib
import io
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from nanochat_core.artifacts.stage import Job, Recipe, Runtime
from nanochat_core.model.flops import flops_per_token
from nanochat_core.sources.documents import MANIFEST, Shards, shard_list, texts
from nanochat_core.sources.shard_sets import describe, manifest, write_shard
from nanochat_core.stages import pretrain, shards
from nanochat_core.tokenizer.bpe import train

VOCAB = 2048
SHAPE: dict[str, Any] = {
    "depth": 4,
    "aspect": 32,
    "head_dim": 32,
    "sequence_len": 256,
    "total_batch": 2048,
    "scale_rates": False,
    "eval_every": 0,
    "eval_tokens": 400_000,
    "prompts": (),
}
SEED: dict[str, Any] = {
    "arch": "seed",
    "embedding_lr": 0.2,
    "unembedding_lr": 0.004,
    "weight_decay": 0.0,
    "warmup_steps": 0,
    "warmdown": 0.2,
    "final_lr": 0.0,
    "momentum": (0.85, 0.95, 0.95),
    "momentum_warmup": 300,
    "grad_clip": 1.0,
}
MODERN: dict[str, Any] = {"arch": "modern", "weight_decay": 0.1}


class Bench:
    """Pretraining runs over one corpus and tokenizer, each in a directory of its own."""

    def __init__(self, base: Path) -> None:
        self.runtime = Runtime(base_dir=base, compile=False)
        self.base = base
        self.text = self.job("shards", shards.Config())
        shards.run(self.text.config, self.text)
        self.documents = list(texts(self.text.path, "train"))
        self.tokenizer = base / "tokenizer" / "bench"
        self.tokenizer.mkdir(parents=True)
        train(self.documents[:4000], VOCAB).save(self.tokenizer)

    def job(self, stage: str, config: Recipe, name: str = "bench", **inputs: Path) -> Job:
        path = self.base / stage / name
        path.mkdir(parents=True)
        return Job(stage, config, inputs, path, self.runtime, name)

    def order(self, seed: int) -> Path:
        """The corpus with its train documents in an order of the seed's."""
        job = self.base / "shards" / f"order-{seed}"
        if not job.exists():
            job.mkdir()
            root = self.base / "downloads"
            path = root / f"order-{seed}.parquet"
            write_shard(path, random.Random(seed).sample(self.documents, len(self.documents)))
            found = Shards((describe(path),), shard_list(self.text.path).validation)
            (job / MANIFEST).write_text(manifest(found, root))
        return job

    def bpb(self, recipe: dict[str, Any], steps: int, fraction: float, seed: int) -> float:
        config = pretrain.Config(**SHAPE, **recipe, steps=steps, lr_fraction=fraction, seed=seed)
        name = f"{recipe['arch']}-{fraction}-{seed}"
        job = self.job("pretrain", config, name, text=self.order(seed), tokenizer=self.tokenizer)
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = pretrain.run(config, job)
        value = float(metrics["val_bpb"] or 0.0)
        print(f"{name}: {steps} steps, {value:.4f} bits per byte", flush=True)
        return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="of the seed recipe")
    parser.add_argument("--share", type=float, default=0.6, help="of its FLOPs, for modern")
    parser.add_argument("--random-seeds", type=int, default=3)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="of all rates")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    cost = {
        recipe["arch"]: flops_per_token(pretrain.Config(**SHAPE, **recipe).shape(VOCAB))
        for recipe in (SEED, MODERN)
    }
    steps = {
        "seed": options.steps,
        "modern": int(options.steps * options.share * cost["seed"] / cost["modern"]),
    }
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for recipe in (SEED, MODERN):
            arch = recipe["arch"]
            first = {fraction: bench.bpb(recipe, steps[arch], fraction, 0) for fraction in options.fractions}
            best = min(first, key=first.__getitem__)
            others = [bench.bpb(recipe, steps[arch], best, s) for s in range(1, options.random_seeds)]
            found[arch] = [first[best], *others]
            print(f"{arch}: the best factor on its rates is {best}", flush=True)
    print(f"\n{'recipe':8} {'FLOPs':>9} {'bits per byte':>14} {'spread':>7}")
    for arch, values in found.items():
        flops = steps[arch] * SHAPE["total_batch"] * cost[arch]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{arch:8} {flops:9.2e} {statistics.mean(values):14.4f} {spread:7.4f}")
    pairs = [modern - seed for modern, seed in zip(found["modern"], found["seed"], strict=True)]
    difference = statistics.mean(pairs)
    spread = statistics.stdev(pairs) if len(pairs) > 1 else 0.0
    print(f"\nmodern - seed, by pairs of one random seed: {difference:+.4f}, spread {spread:.4f}")
    summary = {
        "share": options.share,
        "seed_bpb": round(statistics.mean(found["seed"]), 4),
        "modern_bpb": round(statistics.mean(found["modern"]), 4),
        "difference": round(difference, 4),
        "spread": round(spread, 4),
        "reached": difference <= 0,
    }
    if options.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
