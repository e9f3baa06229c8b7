"""The loss of a softcapped head without its logits: made a slice at a time, turned into gradients, dropped.

At a vocabulary of 32,768 the fp32 logits of one 16 x 2,048 batch take 4 GB, several times over in a plain
implementation. Here the gradient of a slice is taken while the slice exists, as in Liger's fused linear
cross-entropy (https://arxiv.org/abs/2410.10989), so nothing is computed twice either.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_core.model.forward import SOFTCAP, squeeze_, squeeze_slope_

# Logits alive at once. A CPU wants them in its cache: 2^22 of fp32 are 16 MB. On a GPU a slice of n rows
# reads and writes the whole fp32 gradient of the head, 8VC bytes beside 6nVC FLOPs: on a GB10 (273 GB/s,
# 125 TFLOP/s) that takes 610 / n of the products' own time, 10 times as long with the CPU's 64 rows of V =
# 65,536, 15 % with 4,096, which are 2^28 logits: 1 GB, about 3 with what is made of them.
SLICE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
MOST_SLICES = 16  # on a GPU, as the compiler unrolls the loop; past 2^32 logits in all, slices grow instead


def slice_rows(N: int, V: int, device: str) -> int:
    """How many of N rows of V logits are alive at once on a kind of device."""
    rows = max(1, SLICE_ELEMENTS[device] // V)
    return rows if device == "cpu" else max(rows, -(-N // MOST_SLICES))


class _SoftcappedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, with_grad: bool
    ) -> tuple[Tensor, Tensor]:
        N, V = x.size(0), head.size(0)
        rows = slice_rows(N, V, x.device.type)
        nll = torch.zeros(N, dtype=torch.float32, device=x.device)
        kept = targets >= 0
        weights = weights.float() * kept
        safe = targets.clamp_min(0)
        if with_grad:
            grad_x = torch.empty_like(x)
            grad_head = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
        for start in range(0, N, rows):
            s = slice(start, start + rows)
            t = squeeze_((x[s] @ head.t()).float())  # (n, V)
            capped = t * SOFTCAP
            target = safe[s, None]
            lse = capped.logsumexp(-1, keepdim=True)
            nll[s] = (lse - capped.gather(1, target)).squeeze(1) * kept[s]
            if with_grad:
                g = capped.sub_(lse).exp_()  # softmax
                g.scatter_add_(1, target, torch.full_like(lse, -1.0))
                g.mul_(squeeze_slope_(t)).mul_(weights[s, None])  # through the softcap
                g = g.to(x.dtype)
                torch.mm(g, head, out=grad_x[s])
                grad_head += g.t() @ x[s]
        if with_grad:
            ctx.save_for_backward(grad_x, grad_head.to(head.dtype))
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        return (
            grad_x * grad_total.to(grad_x.dtype),
            grad_head * grad_total.to(grad_head.dtype),
            None,
            None,
            None,
        )


def softcapped_nll(x: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) hidden, (V, C) head, (N,) targets and weights -> sum of weights x nll, and nll (N,) in nats,
    detached."""
    with_grad = torch.is_grad_enabled() and (x.requires_grad or head.requires_grad)
    total, nll = _SoftcappedNLL.apply(x, head, targets, weights, with_grad)
    return total, nll
