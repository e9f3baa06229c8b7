"""AdamW (https://arxiv.org/abs/1711.05101), on a flat piece of a parameter."""

from torch import Tensor


def adamw_update(
    p: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step in place; `step` counts from 1. Epsilon is added after the bias correction, as in the
    paper."""
    beta1, beta2 = betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = square.div(1 - beta2**step).sqrt_().add_(eps)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
