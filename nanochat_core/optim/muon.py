"""Muon: momentum whose matrix is replaced by the nearest orthogonal one before it is applied.

Letters: K matrices of one shape, m rows, n columns. All K are updated as one batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Iteration(NamedTuple):
    """Quintics a, b, c that bring singular values to 1, and how a matrix is made small enough for them."""

    steps: tuple[tuple[float, float, float], ...]
    margin: float  # of the norm it is divided by
    eps: float


# Newton-Schulz with one quintic for all five steps: https://kellerjordan.github.io/posts/muon/
CLASSIC = Iteration(((3.4445, -4.7750, 2.0315),) * 5, margin=1.0, eps=1e-7)

# Polar Express, the best quintic for each step in turn, with its safety factor: https://arxiv.org/abs/2505.16932
POLAR_EXPRESS = Iteration(
    (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
    margin=1.01,
    eps=1e-6,
)


class MuonState(NamedTuple):
    """What Muon remembers of K matrices: momentum (K, m, n), and for `modern` the second moment of rows or
    columns."""

    momentum: Tensor
    second: Tensor


def new_state(K: int, m: int, n: int, device: torch.device) -> MuonState:
    factored = (K, m, 1) if m >= n else (K, 1, n)
    return MuonState(torch.zeros(K, m, n, device=device), torch.zeros(factored, device=device))


def orthogonalize(G: Tensor, iteration: Iteration, dtype: torch.dtype) -> Tensor:
    """(K, m, n) -> about the nearest matrices with all singular values 1. The product runs in `dtype`."""
    X = G.to(dtype)
    tall = X.size(-2) > X.size(-1)
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * iteration.margin + iteration.eps)
    for a, b, c in iteration.steps:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if tall else X


def muon_update(
    p: Tensor,
    grad: Tensor,
    state: MuonState,
    *,
    modern: bool,
    lr: float,
    momentum: float,
    beta2: float,
    weight_decay: float,
    dtype: torch.dtype,
) -> None:
    """One step, in place, of K matrices `p` (K, m, n) given their gradients; `grad` is used up.

    `modern` adds row equilibration (MuonEq), the rescaling of Muon+, NorMuon's second moment and cautious
    weight decay.
    """
    m, n = p.shape[-2:]
    state.momentum.lerp_(grad, 1 - momentum)
    g = grad.lerp_(state.momentum, momentum)  # Nesterov
    if not modern:
        X = orthogonalize(g, CLASSIC, dtype).to(p.dtype)
        p.add_(X, alpha=-lr * max(1.0, m / n) ** 0.5)
        return
    g = g / (g.norm(dim=-1, keepdim=True) + 1e-10)
    X = orthogonalize(g, POLAR_EXPRESS, dtype).to(p.dtype)
    X = X * (min(m, n) ** 0.5 / (X.norm(dim=(-2, -1), keepdim=True) + 1e-10))
    # NorMuon (https://arxiv.org/abs/2510.05491): even out rows (or columns), keep the whole's norm.
    reduced = -1 if m >= n else -2
    mean = X.square().mean(dim=reduced, keepdim=True)
    state.second.lerp_(mean, 1 - beta2)
    scale = state.second.clamp_min(1e-10).rsqrt()
    before = mean.sum(dim=(-2, -1), keepdim=True)
    after = (mean * scale.square()).sum(dim=(-2, -1), keepdim=True)
    X = X * scale * (before / after.clamp_min(1e-20)).sqrt()
    lr = lr * max(1.0, m / n) ** 0.5
    if weight_decay:  # cautious: only where the update and the weight agree, https://arxiv.org/abs/2411.16085
        p.mul_(1 - lr * weight_decay * (X * p >= 0))
    p.add_(X, alpha=-lr)
