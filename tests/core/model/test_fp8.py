"""Products in 8 bits, emulated where the hardware has none: near the exact ones, and good enough to learn
with."""

import pytest
import torch

from nanochat_core.model import fp8
from nanochat_core.model.gpt import GPT, GPTConfig, Linear
from nanochat_core.optim.groups import parameter_groups
from nanochat_core.optim.optimizer import Optimizer
from nanochat_core.optim.schedule import Rates


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_quantizing_keeps_three_bits_of_every_large_value() -> None:
    x = random(64, 64)
    values, scale = fp8.quantize(x, fp8.FORWARD)
    back = values.float() * scale
    assert back.abs().max() == x.abs().max()
    large = x.abs() > x.abs().max() / 64
    assert ((back - x).abs()[large] <= x.abs()[large] / 16 + 1e-6).all()
    zeros, _ = fp8.quantize(torch.zeros(4, 4), fp8.FORWARD)
    assert (zeros.float() == 0).all()


def test_output_and_gradients_are_near_the_exact_ones() -> None:
    x, w = random(3, 40, 128).requires_grad_(), (random(256, 128, seed=1) * 0.1).requires_grad_()
    upstream = random(3, 40, 256, seed=2)
    fp8.linear(x, w).backward(upstream)
    near = x.grad, w.grad
    exact_x, exact_w = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    torch.nn.functional.linear(exact_x, exact_w).backward(upstream)
    for found, exact in zip(near, (exact_x.grad, exact_w.grad), strict=True):
        assert found is not None and exact is not None
        assert (found - exact).norm() / exact.norm() < 0.08


def test_only_wide_products_in_sixteens_are_taken() -> None:
    assert fp8.fits(128, 512) and not fp8.fits(24, 128) and not fp8.fits(136, 128) and not fp8.fits(64, 256)


def losses(in_8_bits: bool) -> list[float]:
    model = GPT(GPTConfig.of_depth(2, 128, sequence_len=32, aspect=64, head_dim=64)).init_weights(0)
    if in_8_bits:
        model.use_fp8()
    taken = {module.in_8_bits for module in model.blocks.modules() if isinstance(module, Linear)}
    assert taken == ({True, False} if in_8_bits else {False})  # the gates stay out of it
    model.compute_dtype = torch.float32
    optimizer = Optimizer(parameter_groups(model, Rates()), dtype=torch.float32)
    idx = torch.randint(0, 8, (4, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        total, nll = model.loss(idx[:, :-1], idx[:, 1:], torch.full((4, 32), 1 / 128))
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.reduce()
        optimizer.update(lr=0.3, momentum=0.9, weight_decay=1.0)
        found.append(float(nll.mean()))
    return found


def test_a_model_learns_as_well_in_8_bits() -> None:
    exact, rough = losses(False), losses(True)
    assert rough[-1] < 0.6 * rough[0]
    assert abs(rough[-1] - exact[-1]) < 0.1 * exact[0]


def test_any_number_of_tokens_can_be_multiplied() -> None:
    """The weight's gradient sums over tokens, which a GPU takes in sixteens; rollouts come as they do."""
    w = (random(256, 128, seed=1) * 0.1).requires_grad_()
    x = random(3, 7, 128).requires_grad_()
    y = fp8.linear(x, w)
    y.backward(random(3, 7, 256, seed=2))
    assert y.shape == (3, 7, 256) and x.grad is not None and x.grad.shape == x.shape
    alone = w.detach().clone().requires_grad_()
    exact = torch.nn.functional.linear(x.detach(), alone)
    exact.backward(random(3, 7, 256, seed=2))
    assert w.grad is not None and alone.grad is not None
    assert (y - exact).norm() / exact.norm() < 0.08
    assert (w.grad - alone.grad).norm() / alone.grad.norm() < 0.08


def test_the_emulation_refuses_what_a_gpu_would() -> None:
    a, b = fp8.quantize(random(32, 40), fp8.FORWARD), fp8.quantize(random(40, 32), fp8.FORWARD)
    with pytest.raises(AssertionError):
        fp8.multiply(a, b, torch.float32, fast=False)  # sums over 40
    c = fp8.quantize(random(32, 40), fp8.FORWARD)
    with pytest.raises(AssertionError):
        fp8.multiply((a[0].t()[:32], a[1]), (c[0], c[1]), torch.float32, fast=False)  # 40 columns
    odd = fp8.quantize(random(7, 32), fp8.FORWARD)
    assert fp8.multiply(odd, (c[0][:, :16], c[1]), torch.float32, fast=False).shape == (7, 16)
