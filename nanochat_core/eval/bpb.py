"""Bits per byte: how well a model predicts text, in a unit that does not depend on its tokenizer."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanochat_core.data.batch import Batch
from nanochat_core.machine.ranks import World


class Losses(Protocol):
    """A model's loss: (weighted sum, each token's nats)."""

    def __call__(self, idx: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def bits_per_byte(loss: Losses, batches: Iterable[Batch], token_bytes: Sequence[int], world: World) -> float:
    """Nats of the targets over ln 2 and their bytes. Special tokens stand for no bytes and count for nothing.

    Ranks may have different numbers of batches: they meet once, at the end."""
    device, per_token = world.device, torch.tensor(token_bytes, device=world.device)
    nats, count = 0.0, 0.0
    for batch in batches:
        targets = batch.targets.to(device)
        _, nll = loss(batch.inputs.to(device), targets, torch.zeros(targets.shape, device=device))
        sizes = per_token[targets.clamp_min(0)] * (targets >= 0)
        nats += float((nll * (sizes > 0)).double().sum())
        count += float(sizes.sum())
    nats, count = world.sum(nats, count)
    if not count:
        raise ValueError("there is nothing to validate on: no target stands for a byte; give it more text")
    if not math.isfinite(nats):
        raise ValueError("the model's loss on the validation text is not finite; lower the rates")
    return nats / (math.log(2) * count)
