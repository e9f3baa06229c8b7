"""The `modern` model against a plain reading of its definition, and how both presets' weights begin."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.model.gpt import GPT, GPTConfig


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain(w: dict[str, Tensor], c: GPTConfig, idx: Tensor) -> Tensor:
    """Logits (T, V) of one row (T,), one head at a time, with dense masks."""
    T, n, D = len(idx), c.n_layer, c.head_dim
    x = rms(w["wte.weight"][idx])
    smeared = x.clone()
    for t in range(1, T):
        gate = torch.sigmoid(w["smear_gate.weight"][0] @ x[t, :24])
        smeared[t] = x[t] + w["smear_lambda"] * gate * x[t - 1]
    x = x0 = smeared
    theta = torch.arange(T)[:, None] * 100_000.0 ** -(torch.arange(0, D, 2) / D)  # (T, D/2)

    def turned(a: Tensor) -> Tensor:
        z = torch.complex(a[:, : D // 2], a[:, D // 2 :]) * torch.polar(torch.ones_like(theta), -theta)
        return torch.cat((z.real, z.imag), dim=-1)

    short = math.ceil(c.sequence_len / 4 / 128) * 128
    back = torch.arange(T)[:, None] - torch.arange(T)[None]
    for i in range(n):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        window = c.sequence_len if i == n - 1 or i % 4 == 3 else short
        seen = (back >= 0) & (back <= window)
        h, p = rms(x), f"blocks.{i}.attn"
        q, k, v = (h @ w[f"{p}.{name}.weight"].T for name in ("c_q", "c_k", "c_v"))
        if i % 2 == (n - 1) % 2:
            ve = w[f"value_embeds.{i}.weight"][idx]
            gate = 3 * torch.sigmoid(h[:, :12] @ w[f"{p}.ve_gate.weight"].T)  # (T, H)
            v = v + gate.repeat_interleave(D, dim=1) * ve
        heads = []
        for j in range(c.n_head):
            s = slice(j * D, (j + 1) * D)
            scores = (1.2 * rms(turned(q[:, s]))) @ (1.2 * rms(turned(k[:, s]))).T / D**0.5
            heads.append(scores.masked_fill(~seen, -math.inf).softmax(-1) @ v[:, s])
        x = x + torch.cat(heads, dim=-1) @ w[f"{p}.c_proj.weight"].T
        h = F.relu(rms(x) @ w[f"blocks.{i}.mlp.c_fc.weight"].T) ** 2
        x = x + h @ w[f"blocks.{i}.mlp.c_proj.weight"].T
        if i == n // 2:
            middle = x
    x = rms(x - w["backout_lambda"] * middle)
    return 15 * torch.tanh((x @ w["lm_head.weight"].T)[:, : c.vocab_size] / 15)


@pytest.mark.parametrize("depth", [4, 5])
def test_modern_is_what_its_definition_says(depth: int) -> None:
    T = 200  # more than the short window
    config = GPTConfig.of_depth(depth, 101, sequence_len=T, aspect=8, head_dim=16)
    model = GPT(config).init_weights(1)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():  # so far from their beginnings that every part matters
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.2)
    model.double()
    model.compute_dtype = torch.float64
    idx = torch.randint(0, 101, (1, T), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(dict(model.state_dict()), config, idx[0])
        torch.testing.assert_close(model(idx)[0].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_weights_begin_as_spread_as_nanochats(arch: str) -> None:
    C = 256
    config = GPTConfig.of_depth(4, 2048, arch=arch, aspect=64, head_dim=128)  # type: ignore[arg-type]
    assert config.n_embd == C
    w = GPT(config).init_weights(0).state_dict()
    matrices = {"attn.c_q": 1.0, "attn.c_k": 1.0, "attn.c_v": 1.0, "mlp.c_fc": 1.0}
    if arch == "modern":
        matrices["mlp.c_fc"] = 0.4
        expected = {"wte.weight": 0.8, "lm_head.weight": 0.001}
        expected |= {f"value_embeds.{i}.weight": C**-0.5 for i in (1, 3)}
        assert w["resid_lambdas"].tolist() == pytest.approx([1.15, 1.15 - 0.1 / 3, 1.05 + 0.1 / 3, 1.05])
        assert w["x0_lambdas"].tolist() == pytest.approx([0.20, 0.15, 0.10, 0.05])
        assert (w["smear_lambda"].item(), w["backout_lambda"].item()) == (0.0, pytest.approx(0.2))
        gates = [w["smear_gate.weight"], *(w[f"blocks.{i}.attn.ve_gate.weight"] for i in (1, 3))]
        assert all(gate.min() >= 0 and 0.01 < gate.max() <= 0.02 for gate in gates)
    else:
        expected = {"wte.weight": 1.0, "lm_head.weight": 0.0}
    for i in range(4):
        expected |= {f"blocks.{i}.{name}.weight": times * C**-0.5 for name, times in matrices.items()}
        expected |= {f"blocks.{i}.{name}.weight": 0.0 for name in ("attn.c_proj", "mlp.c_proj")}
        for name, times in matrices.items():
            largest = w[f"blocks.{i}.{name}.weight"].abs().max() / (times * C**-0.5)
            assert largest <= 3**0.5 if arch == "modern" else largest > 3  # uniform, or normal
    for name, std in expected.items():
        assert float(w[name].std()) == pytest.approx(std, rel=0.02), name
