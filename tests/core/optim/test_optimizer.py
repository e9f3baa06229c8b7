"""Muon against an SVD and against torch's own, AdamW against torch's own, and the schedules' bounds."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.adamw import adamw_update
from nanochat_core.optim.groups import parameter_groups
from nanochat_core.optim.muon import (
    CLASSIC,
    POLAR_EXPRESS,
    Iteration,
    MuonState,
    muon_update,
    new_state,
    orthogonalize,
)
from nanochat_core.optim.optimizer import Optimizer
from nanochat_core.optim.schedule import Rates, Schedule

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_muon(p: torch.Tensor, grad: torch.Tensor, state: MuonState, **rates: Any) -> None:
    """One update, of the modern kind in fp32 unless said otherwise; the gradient stays as it is."""
    usual = {"modern": True, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0, "dtype": torch.float32}
    muon_update(p, grad.clone(), state, **usual | rates)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 64, 16), (2, 16, 64), (1, 12, 1)])
@pytest.mark.parametrize(("iteration", "band"), [(POLAR_EXPRESS, (0.85, 1.15)), (CLASSIC, (0.6, 1.25))])
def test_orthogonalize_keeps_directions_and_evens_singular_values(
    shape: tuple[int, ...], iteration: Iteration, band: tuple[float, float]
) -> None:
    G = random(*shape)
    X = orthogonalize(G, iteration, torch.float32)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    within = U.mT @ X @ V.mT  # diagonal where X has G's directions
    values = torch.linalg.svdvals(X)
    large = 0.05 * S.amax(-1, keepdim=True) < S  # the smallest ones need more steps than five
    assert (values[large] > band[0]).all() and (values < band[1]).all()
    off = within - torch.diag_embed(torch.diagonal(within, dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_a_batch_of_matrices_is_the_same_as_one_at_a_time() -> None:
    G = random(5, 24, 16)
    together = orthogonalize(G, POLAR_EXPRESS, torch.float32)
    for i in range(5):
        alone = orthogonalize(G[i : i + 1], POLAR_EXPRESS, torch.float32)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-4)


def test_classic_muon_is_torchs_muon() -> None:
    p = random(1, 24, 16)
    theirs = torch.nn.Parameter(p[0].clone())
    reference = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original", eps=1e-7
    )
    state = new_state(1, 24, 16, CPU)
    for step in range(4):
        grad = random(1, 24, 16, seed=step + 1)
        theirs.grad = grad[0].clone()
        reference.step()
        step_muon(p, grad, state, modern=False, lr=0.02, momentum=0.95, beta2=0.0, dtype=torch.bfloat16)
    # bf16 products of a batch round elsewhere than those of one matrix: a few of their last bits of 0.02.
    torch.testing.assert_close(p[0], theirs.detach(), atol=0.02 * 4 * 0.01, rtol=0)


def test_adamw_is_torchs_adamw() -> None:
    p = random(50)
    theirs = torch.nn.Parameter(p.clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    mean, square = torch.zeros(50), torch.zeros(50)
    for step in range(1, 6):
        grad = random(50, seed=step)
        theirs.grad = grad.clone()
        reference.step()
        adamw_update(
            p, grad, mean, square, step=step, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1
        )
    torch.testing.assert_close(p, theirs.detach(), atol=1e-6, rtol=1e-5)


def test_modern_muon_moves_every_matrix_by_the_same_amount() -> None:
    """Muon+ and NorMuon fix the update's norm at sqrt(min(m, n)), however large the gradient."""
    for m, n in ((16, 16), (64, 16), (16, 64)):
        p = torch.zeros(2, m, n)
        grad = random(2, m, n) * torch.tensor([1.0, 1e4])[:, None, None]
        step_muon(p, grad, new_state(2, m, n, CPU), lr=1.0)
        expected = min(m, n) ** 0.5 * max(1.0, m / n) ** 0.5
        torch.testing.assert_close(p.norm(dim=(1, 2)), torch.full((2,), expected), rtol=1e-3, atol=0)


def test_cautious_decay_shrinks_only_what_the_update_shrinks_too() -> None:
    p = torch.full((1, 8, 8), 0.5)
    grad = random(1, 8, 8)
    before, decayed = p.clone(), p.clone()
    for q, decay in ((p, 0.0), (decayed, 0.3)):
        step_muon(q, grad, new_state(1, 8, 8, CPU), lr=0.01, weight_decay=decay)
    shrinks = p < before
    assert (decayed[shrinks] < p[shrinks]).all()
    assert torch.equal(decayed[~shrinks], p[~shrinks])


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_every_parameter_is_in_exactly_one_group(arch: str) -> None:
    model = GPT(GPTConfig.of_depth(3, 300, arch=arch, aspect=16, head_dim=16))  # type: ignore[arg-type]
    names = [name for group in parameter_groups(model, Rates()) for name in group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_parameters_and_gradients_live_in_their_groups_stack() -> None:
    model = GPT(GPTConfig.of_depth(2, 300, aspect=16, head_dim=16, sequence_len=32)).init_weights(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(parameter_groups(model, Rates()), dtype=torch.float32)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    idx = torch.zeros(1, 32, dtype=torch.long)
    optimizer.zero_grad()
    total, _ = model.loss(idx, idx, torch.ones(1, 32))
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert optimizer.reduce() == pytest.approx(float(norm), rel=1e-5)
    optimizer.update(lr=1.0, momentum=0.9, weight_decay=1.0)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert {"lm_head.weight", "blocks.0.mlp.c_proj.weight", "wte.weight"} <= set(moved)


@given(
    steps=st.integers(1, 5000),
    at=st.floats(0, 1),
    warmup=st.integers(0, 100),
    warmdown=st.floats(0, 1),
    final=st.floats(0, 1),
)
def test_rates_stay_between_zero_and_one(
    steps: int, at: float, warmup: int, warmdown: float, final: float
) -> None:
    step = min(steps - 1, int(at * steps))
    schedule = Schedule(warmup, warmdown, final)
    assert 0 <= schedule.lr(step, steps) <= 1
    assert 0.85 <= schedule.muon_momentum(step, steps) <= 0.97
    assert 0 <= schedule.weight_decay(step, steps) <= 1


def test_the_schedule_of_nanochat() -> None:
    schedule = Schedule()
    assert schedule.lr(0, 1000) == pytest.approx(1 / 40)
    assert schedule.lr(200, 1000) == 1
    assert schedule.lr(999, 1000) == pytest.approx(0.05 + 0.95 / 650)
    assert schedule.muon_momentum(0, 10_000) == 0.85
    assert schedule.muon_momentum(400, 10_000) == pytest.approx(0.97)
    assert schedule.muon_momentum(10_000, 10_000) == pytest.approx(0.90)


def plain_modern_muon(
    p: torch.Tensor, grads: list[torch.Tensor], lr: float, momentum: float, beta2: float, decay: float
) -> torch.Tensor:
    """Steps of one matrix (m, n): Nesterov, MuonEq, Polar Express, Muon+, NorMuon, cautious decay."""
    m, n = p.shape
    buffer, second = torch.zeros_like(p), torch.tensor(0.0)
    for grad in grads:
        buffer = momentum * buffer + (1 - momentum) * grad
        g = momentum * buffer + (1 - momentum) * grad
        g = g / g.norm(dim=1, keepdim=True)
        X = g / (1.01 * g.norm() + 1e-6)
        for a, b, c in POLAR_EXPRESS.steps:
            A = X @ X.T
            X = a * X + (b * A + c * A @ A) @ X
        X = X * min(m, n) ** 0.5 / X.norm()
        second = beta2 * second + (1 - beta2) * X.square().mean(dim=1 if m >= n else 0, keepdim=True)
        even = X / second.sqrt()
        X = even * X.norm() / even.norm()
        rate = lr * max(1.0, m / n) ** 0.5
        p = p - rate * X - rate * decay * p * (X * p >= 0)
    return p


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_modern_muon_is_its_plain_reading(shape: tuple[int, int]) -> None:
    m, n = shape
    p = random(2, m, n)
    rows = torch.logspace(-2, 1, m)[:, None]  # unequal rows and columns: what MuonEq and NorMuon are about
    columns = torch.logspace(0, 1, n)[None]
    grads = [random(2, m, n, seed=step + 1) * rows * columns for step in range(4)]
    expected = [plain_modern_muon(p[k], [g[k] for g in grads], 0.1, 0.9, 0.8, 0.3) for k in range(2)]
    state = new_state(2, m, n, CPU)
    for grad in grads:
        step_muon(p, grad, state, lr=0.1, beta2=0.8, weight_decay=0.3)
    torch.testing.assert_close(p, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_weight_decay_falls_by_a_cosine() -> None:
    found = [Schedule().weight_decay(step, 1000) for step in (0, 250, 500, 750, 1000)]
    assert found == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_rates_and_momentum_at_a_few_steps_are_nanochats() -> None:
    """Warm up over 40 steps, hold, fall over the last 65 % to 5 %; momentum falls meanwhile, to .90."""
    schedule = Schedule()
    assert [schedule.lr(step, 2000) for step in (0, 19, 39, 700, 1350, 2000)] == pytest.approx(
        [1 / 40, 0.5, 1, 1, 0.525, 0.05]
    )
    assert [schedule.muon_momentum(step, 2000) for step in (0, 200, 400, 700, 1350, 2000)] == pytest.approx(
        [0.85, 0.91, 0.97, 0.97, 0.935, 0.90]
    )


def test_only_smear_and_backout_keep_their_rate_at_another_batch() -> None:
    model = GPT(GPTConfig.of_depth(2, 300, aspect=384, head_dim=64))  # 768 wide: no scaling by width
    rates = {
        (scale, stage): {
            name: group.lr
            for group in parameter_groups(model, Rates(scale=scale, stage=stage))
            for name in group.names
        }
        for scale, stage in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.1))
    }
    plain = rates[1.0, 1.0]
    published = {
        "lm_head.weight": 0.008,
        "wte.weight": 0.3,
        "value_embeds.1.weight": 0.15,
        "resid_lambdas": 0.005,
        "x0_lambdas": 0.5,
        "blocks.0.mlp.c_fc.weight": 0.02,
    }
    for name, rate in plain.items():
        fixed = name.startswith(("smear", "backout"))
        assert rate == pytest.approx(0.2 if fixed else published.get(name, 0.02)), name
        assert rates[2.0, 1.0][name] == pytest.approx(rate * (1 if fixed else 2)), name
        assert rates[2.0, 0.1][name] == pytest.approx(rate * (0.1 if fixed else 0.2)), name
