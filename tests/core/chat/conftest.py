"""A base_dir with a real tokenizer and a tiny model in it, as the stages leave them."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nanochat_core.model.gpt import GPT, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer, train

SHAPE = GPTConfig("seed", sequence_len=128, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=256)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(["the quick brown fox jumps over the lazy dog, and the dog does not mind"], 290)


@pytest.fixture
def trained(tmp_path: Path, tokenizer: Tokenizer) -> Callable[[GPT], Path]:
    """Leave a model behind as `sft` would; the directory."""

    def trained(model: GPT) -> Path:
        tokenizer.save(tmp_path / "tokenizer" / "t0")
        path = tmp_path / "sft" / "s0"
        path.mkdir(parents=True)
        write_config(path, model.config, tokenizer.fingerprint)
        save_file(model.state_dict(), path / "model.safetensors")
        inputs = {"tokenizer": {"stage": "tokenizer", "fingerprint": "t0"}}
        (path / "job.json").write_text(json.dumps({"inputs": inputs}))
        return path

    return trained


@pytest.fixture
def random_model(tokenizer: Tokenizer) -> Callable[[str], GPT]:
    def build(arch: str) -> GPT:
        model = GPT(replace(SHAPE, arch=arch, vocab_size=tokenizer.vocab_size)).init_weights(1)
        rng = torch.Generator().manual_seed(2)
        for weight in model.eval().requires_grad_(False).parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) / 16)
        return model

    return build


@pytest.fixture
def parrot(tokenizer: Tokenizer) -> Callable[..., GPT]:
    """A model that has learned nothing but which token comes after which: chains of tokens, said greedily."""

    def parrot(*chains: list[int]) -> GPT:
        config = replace(SHAPE, vocab_size=tokenizer.vocab_size)
        model = GPT(config).init_weights(1).eval().requires_grad_(False)  # blocks that add nothing
        for chain in chains:
            for token, following in itertools.pairwise(chain):
                model.lm_head.weight[following] += model.wte.weight[token]
        return model

    return parrot
