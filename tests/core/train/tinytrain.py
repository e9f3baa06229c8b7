"""A model, a tokenizer and text small enough to train in a second, in this process."""

from pathlib import Path

import torch

from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.stage import Job, Recipe, Runtime
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train.ranks import World

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
