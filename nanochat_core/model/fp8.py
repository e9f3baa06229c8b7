"""Matrix products in 8 bits with one scale per tensor: e4m3 for activations and weights, e5m2 for gradients.

On CUDA (sm89 and later) `torch._scaled_mm` multiplies them; elsewhere the same 8-bit values are multiplied as
fp32, which has the same rounding and none of the speed. Scales are dynamic: the largest value of a tensor
becomes the largest of the format (https://arxiv.org/abs/2209.05433). Row-wise scales are no option on a GB10:
its cuBLAS does not support them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SIXTEEN = 16  # bytes: cuBLAS wants the inner and the last dimension of an 8-bit product in these
SMALLEST = 128  # narrower products are bound by memory, and casting costs more than it saves


def fits(n_in: int, n_out: int) -> bool:
    """Whether a product is worth it and possible: both sides in sixteens, neither too narrow."""
    return n_in % SIXTEEN == 0 and n_out % SIXTEEN == 0 and min(n_in, n_out) >= SMALLEST


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as 8-bit values and the scale (fp32, a scalar tensor) that brings them back."""
    largest = torch.finfo(dtype).max
    scale = (largest / x.abs().amax().double().clamp_min(1e-12)).float()
    return (x.float() * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


def multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool) -> Tensor:
    """(m, k) @ (k, n) of quantized matrices. `fast` accumulates less exactly: good enough for forward
    only."""
    (a8, a_scale), (b8, b_scale) = a, b
    # What torch._scaled_mm asks for, also of the emulation, so that tests see what a GPU would refuse.
    assert a8.size(1) % SIXTEEN == 0 and b8.size(1) % SIXTEEN == 0, (a8.shape, b8.shape)
    if a8.is_cuda:  # wants the left by rows and the right by columns
        right = b8.t().contiguous().t()
        product: Tensor = torch._scaled_mm(
            a8.contiguous(), right, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
        )
        return product
    return (a8.float() @ b8.float() * (a_scale * b_scale)).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, w8 = quantize(x, FORWARD), quantize(weight, FORWARD)
        ctx.save_for_backward(*x8, *w8)
        ctx.dtypes = x.dtype, weight.dtype
        return multiply(x8, (w8[0].t(), w8[1]), x.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        g8 = quantize(grad, BACKWARD)
        grad_x = multiply(g8, (w8, w_scale), x_dtype, fast=False)
        grad_w = multiply((g8[0].t(), g8[1]), (x8, x_scale), w_dtype, fast=False)
        return grad_x, grad_w


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., n_in) times weight (n_out, n_in), transposed, in 8 bits; activations keep their type.

    Tokens are filled up with zeros to a multiple of sixteen: the weight's gradient sums over them, and
    rollouts come in any number.
    """
    rows = x.reshape(-1, x.size(-1))
    N = rows.size(0)
    flat: Tensor = _Product.apply(F.pad(rows, (0, 0, 0, -N % SIXTEEN)) if N % SIXTEEN else rows, weight)
    return flat[:N].view(*x.shape[:-1], weight.size(0))
