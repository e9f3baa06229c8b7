"""The model's arithmetic, written once: training, evaluation and decoding all run `forward_pass`.

They differ in how they multiply matrices and in where earlier keys and values come from, and pass both in as
functions. `turn` and `norm` may also be passed in: the decoder has faster forms of the two, and compares them
with the ones defined here before it is used.

Letters: C width, H heads, Hk key heads, D head dimension; `...` is (B, T) in training, (N,) in decoding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.model.shape import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig

SOFTCAP = 15.0
NORM_EPS = 1e-6
VALUE_GATE = 3.0  # the gate of a value embedding lies between 0 and this
HIDDEN_ACT = "relu2"  # what transformers calls `activation`

Function = Callable[[Tensor], Tensor]
Attend = Callable[[int, Sequence[Tensor], Tensor], Tensor]
"""Layer number, queries and keys as `Layer.heads` returned them but turned, values -> (..., H*D)."""


class Layer(NamedTuple):
    """The matrix products of one layer, and its value embedding if it has one."""

    heads: Callable[[Tensor], tuple[Sequence[Tensor], Tensor]]
    """(..., C) -> queries and keys, together or apart, D last; and values (..., Hk, D)."""
    out: Function
    up: Function
    down: Function
    value: Function | None  # token ids -> (..., Hk*D)
    value_gate: Function | None  # (..., VALUE_GATE_CHANNELS) -> (..., Hk)


class Scalars(NamedTuple):
    """What `modern` learns besides matrices: tensors in training, plain numbers in decoding."""

    residual: Sequence[Tensor | float]
    from_x0: Sequence[Tensor | float]
    smear: Tensor | float
    smear_gate: Function  # (..., SMEAR_CHANNELS) -> (..., 1)
    backout: Tensor | float


class Weights(NamedTuple):
    embed: Function  # token ids -> (..., C)
    layers: Sequence[Layer]
    scalars: Scalars | None  # None: `seed`


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def angles(config: GPTConfig) -> Tensor:
    """How far each pair of channels turns at each position (P, D/2)."""
    D = config.head_dim
    inverse = config.rope_base ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    return torch.arange(config.positions, dtype=torch.float32)[:, None] * inverse


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, first half of D against the second."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def turn(x: Tensor, cos: Tensor, sin: Tensor, scale: float) -> Tensor:
    """A query or key (..., D), ready for attention."""
    x = norm(rotate(x, cos, sin))
    return x if scale == 1.0 else x * scale


def activation(x: Tensor) -> Tensor:
    return F.relu(x).square()


def squeeze_(logits: Tensor) -> Tensor:
    """Logits to (-1, 1), in place; `softcap` without its factor."""
    return logits.div_(SOFTCAP).tanh_()


def squeeze_slope_(squeezed: Tensor) -> Tensor:
    """The derivative of `softcap` where `squeeze_` gave this, in place."""
    return squeezed.square_().neg_().add_(1.0)


def softcap(logits: Tensor) -> Tensor:
    return SOFTCAP * squeeze_(logits.clone())


def forward_pass(
    config: GPTConfig,
    weights: Weights,
    idx: Tensor,
    *,
    earlier: Function,
    turn: Function,
    attend: Attend,
    norm: Function = norm,
) -> Tensor:
    """Token ids (...) -> (..., C), normed, ready for the head.

    `earlier` maps the normed embeddings of the tokens to those of the token before each (zeros before the
    first).
    """
    scalars = weights.scalars
    x = norm(weights.embed(idx))
    if scalars is not None:
        before = earlier(x)
        gate = scalars.smear * torch.sigmoid(scalars.smear_gate(x[..., :SMEAR_CHANNELS]))
        x = x + gate * before
    x0 = middle = x
    for i, layer in enumerate(weights.layers):
        if scalars is not None:
            x = scalars.residual[i] * x + scalars.from_x0[i] * x0
        h = norm(x)
        qk, v = layer.heads(h)
        if layer.value is not None and layer.value_gate is not None:
            gate = VALUE_GATE * torch.sigmoid(layer.value_gate(h[..., :VALUE_GATE_CHANNELS]))  # (..., Hk)
            v = v + gate[..., None] * layer.value(idx).view(v.shape)
        x = x + layer.out(attend(i, [turn(part) for part in qk], v))
        x = x + layer.down(activation(layer.up(norm(x))))
        if i == config.backout_layer:
            middle = x
    if scalars is not None:
        x = x - scalars.backout * middle
    return norm(x)
