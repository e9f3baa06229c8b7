"""Tiny real models for the engine's tests."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nanochat_core.model.gpt import GPT
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer, train

SHAPE = GPTConfig("seed", sequence_len=96, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)

Build = Callable[..., GPT]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(["the quick brown fox jumps over the lazy dog, and the dog does not mind"], 290)


@pytest.fixture
def build(tokenizer: Tokenizer) -> Build:
    """A model with weights that matter everywhere, also where training starts from zero."""

    def build(arch: str = "seed", **shape: int) -> GPT:
        config = replace(SHAPE, arch=arch, vocab_size=tokenizer.vocab_size, **shape)
        model = GPT(config).init_weights(1).eval().requires_grad_(False)
        rng = torch.Generator().manual_seed(2)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=rng) / weight.size(1) ** 0.5)
            else:
                weight.add_(0.3 * torch.rand(weight.shape, generator=rng))
        model.lm_head.weight.mul_(3)
        return model

    return build


@pytest.fixture
def parrot(tokenizer: Tokenizer) -> Callable[..., GPT]:
    """A model that has learned nothing but which token comes after which: chains of tokens, said greedily."""

    def parrot(*chains: list[int]) -> GPT:
        config = replace(SHAPE, vocab_size=tokenizer.vocab_size, n_embd=256)
        model = GPT(config).init_weights(1).eval().requires_grad_(False)  # blocks that add nothing
        for chain in chains:
            for token, following in itertools.pairwise(chain):
                model.lm_head.weight[following] += model.wte.weight[token]
        return model

    return parrot
