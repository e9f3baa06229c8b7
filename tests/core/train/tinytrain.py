"""A model, a tokenizer and text small enough to train in a second, in this process."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat_core.artifacts.stage import Job, Recipe, Runtime
from nanochat_core.artifacts.store import sha256
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.stages import pretrain
from nanochat_core.tokenizer.bpe import Tokenizer

WORLD = World(0, 1, torch.device("cpu"), torch.float32)


def documents(n: int) -> list[str]:
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "while",
        "rain",
        "fell",
        "over",
        "seven",
        "green",
        "hills",
        "and",
        "nobody",
        "said",
        "anything",
    ]
    return [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(3 + (i * 13) % 50)) for i in range(n)]


def tiny_model(tokenizer: Tokenizer, arch: str = "modern", T: int = 32, depth: int = 2) -> GPT:
    config = GPTConfig.of_depth(
        depth,
        tokenizer.vocab_size,
        arch=arch,  # type: ignore[arg-type]
        sequence_len=T,
        aspect=32 // depth,
        head_dim=16,
    )
    return GPT(config).init_weights(3)


def job_in(path: Path, **runtime: object) -> Job:
    path.mkdir(parents=True, exist_ok=True)
    settings = Runtime.model_validate({"base_dir": path.parent, "compile": False} | runtime)
    return Job("pretrain", Recipe(), {}, path, settings, "f" * 20)


def pretraining_over(base: Path, tokenizer: Tokenizer, validation: list[str], precision: str = "fp32") -> Job:
    """A pretraining of two steps, 16 rows of 64 each."""

    def shard(name: str, texts: list[str]) -> dict[str, object]:
        path = base / "downloads" / name
        pq.write_table(pa.table({"text": texts}), path)
        known = {"size": 0, "sha256": sha256(path), "rows": len(texts), "row_groups": 1}
        return {"name": name, "path": name} | known

    for folder in ("downloads", "shards/s", "tokenizer/t", "pretrain/p"):
        (base / folder).mkdir(parents=True)
    tokenizer.save(base / "tokenizer/t")
    listed = {"train": [shard("a", documents(400))], "validation": [shard("b", validation)]}
    (base / "shards/s/shards.json").write_text(json.dumps(listed))
    config = pretrain.Config(
        depth=1, aspect=32, head_dim=32, sequence_len=64, total_batch=16 * 64, steps=2, prompts=()
    )
    inputs = {"text": base / "shards/s", "tokenizer": base / "tokenizer/t"}
    found = job_in(base / "pretrain/p", device="cpu", threads=1, precision=precision, base_dir=base)
    return dataclasses.replace(found, config=config, inputs=inputs)
