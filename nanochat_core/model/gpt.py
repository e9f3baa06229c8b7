"""The model: a decoder with rotary positions, QK-norm, relu^2 and untied, softcapped logits, in two presets.

`seed` is nanochat's model of November 2025, the one `transformers` calls NanoChat. `modern` is that of July
2026: it adds value embeddings, learned residual scalars, smear, backout and sliding windows.

Letters: B rows, T tokens, C width, H heads, D head dimension, V vocabulary.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.model import attention, fp8
from nanochat_core.model.cross_entropy import softcapped_nll
from nanochat_core.model.forward import (
    Function,
    Layer,
    Scalars,
    Weights,
    angles,
    forward_pass,
    norm,
    softcap,
    turn,
)
from nanochat_core.model.shape import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Linear(nn.Linear):
    """Without bias; the fp32 master weight is cast to the activations' type at use."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.in_8_bits = False

    def reset_parameters(self) -> None:
        """Nothing: init_weights or a saved model fills every weight, and on the meta device torch's own way
        of doing it imports half its compiler."""

    def forward(self, x: Tensor) -> Tensor:
        if self.in_8_bits and self.training:
            return fp8.linear(x, self.weight.to(x.dtype))
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    """A table whose rows init_weights or a saved model fills."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    """The weights of one layer's attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.window = config.windows()[layer]
        self.blocks: BlockMask | None = None
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        C = config.n_embd
        self.c_q = Linear(C, self.n_head * self.head_dim)
        self.c_k = Linear(C, self.n_kv_head * self.head_dim)
        self.c_v = Linear(C, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(self.n_head * self.head_dim, C)
        self.ve_gate = (
            Linear(VALUE_GATE_CHANNELS, self.n_kv_head) if config.has_value_embedding(layer) else None
        )

    def heads(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """(B, T, C) -> queries (B, H, T, D) and keys (B, Hk, T, D); values (B, T, Hk, D)."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        return (q, k), v


class MLP(nn.Module):
    """The weights of one layer's MLP."""

    def __init__(self, C: int) -> None:
        super().__init__()
        self.c_fc = Linear(C, 4 * C)
        self.c_proj = Linear(4 * C, C)


class Block(nn.Module):
    """The weights of one layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config.n_embd)


class After(NamedTuple):
    """Where tokens that continue others stand."""

    positions: Tensor  # (B, T)
    last: Tensor  # (B,): the token before the first new one


AttendAs = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""Layer, window, q, k and v (B, H, T, D) -> (B, H, T, D)."""


class GPT(nn.Module):
    """Weights are fp32 masters; `compute_dtype` is the type activations and matrix products have."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        C, V, n = config.n_embd, config.padded_vocab, config.n_layer
        self.wte = Embedding(V, C)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(n))
        self.lm_head = Linear(C, V)
        self.modern = config.arch == "modern"
        if self.modern:
            self.value_embeds = nn.ModuleDict(
                {
                    str(i): Embedding(V, config.n_kv_head * config.head_dim)
                    for i in range(n)
                    if config.has_value_embedding(i)
                }
            )
            self.resid_lambdas = nn.Parameter(torch.empty(n))
            self.x0_lambdas = nn.Parameter(torch.empty(n))
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(1))
            self.backout_lambda = nn.Parameter(torch.empty(1))
        self._rope: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def init_weights(self, seed: int) -> "GPT":
        """Fill every weight from its own generator, so that the values do not depend on the device or on what
        ran before."""
        rng = torch.Generator().manual_seed(seed)

        def normal(w: Tensor, std: float) -> None:
            w.copy_(torch.empty(w.shape).normal_(0.0, std, generator=rng))

        def uniform(w: Tensor, bound: float, low: float | None = None) -> None:
            w.copy_(torch.empty(w.shape).uniform_(-bound if low is None else low, bound, generator=rng))

        C, n = self.config.n_embd, self.config.n_layer
        modern_std = math.sqrt(3.0 / C)  # a uniform with standard deviation 1/sqrt(C)
        normal(self.wte.weight, 0.8 if self.modern else 1.0)
        if self.modern:
            normal(self.lm_head.weight, 0.001)
        else:
            self.lm_head.weight.zero_()
        for block in self.blocks:
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            for linear in (attn.c_q, attn.c_k, attn.c_v, mlp.c_fc):
                if self.modern:
                    uniform(linear.weight, modern_std * (0.4 if linear is mlp.c_fc else 1.0))
                else:  # https://arxiv.org/abs/2310.17813
                    fan_out, fan_in = linear.weight.shape
                    normal(linear.weight, min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in))
            attn.c_proj.weight.zero_()
            mlp.c_proj.weight.zero_()
            if attn.ve_gate is not None:
                uniform(attn.ve_gate.weight, 0.02, 0.0)
        if self.modern:
            for table in self.value_embeds.values():
                assert isinstance(table, nn.Embedding)
                uniform(table.weight, modern_std)
            self.resid_lambdas.copy_(torch.linspace(1.15, 1.05, n))
            self.x0_lambdas.copy_(torch.linspace(0.20, 0.05, n))
            uniform(self.smear_gate.weight, 0.02, 0.0)
            self.smear_lambda.zero_()
            self.backout_lambda.fill_(0.2)
        return self

    def turns(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The tables of cos and sin (P, D/2), made when first asked for. Ask before compiling: made inside a
        graph, the compiler's own cosine gives other last bits."""
        if self._rope is None or self._rope[0].device != device:
            turns = angles(self.config)
            self._rope = (turns.cos().to(device), turns.sin().to(device))
        return self._rope

    def rope(self, positions: Tensor | None, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, 1, T, D/2) from position 0, or (B, 1, T, D/2) at given positions (B, T)."""
        cos, sin = self.turns(device)
        if positions is None:
            cos, sin = cos[None, None, :T], sin[None, None, :T]
        else:
            cos, sin = cos[positions][:, None], sin[positions][:, None]
        return cos.to(self.compute_dtype), sin.to(self.compute_dtype)

    def embed(self, idx: Tensor) -> Tensor:
        return self.wte(idx).to(self.compute_dtype)  # type: ignore[no-any-return]

    def weights(self) -> Weights:
        """The modules as `forward_pass` takes them."""
        dtype = self.compute_dtype
        layers = []
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            attn, mlp = block.attn, block.mlp
            value: Function | None = None
            if attn.ve_gate is not None:
                value = functools.partial(self._value, i)
            layers.append(Layer(attn.heads, attn.c_proj, mlp.c_fc, mlp.c_proj, value, attn.ve_gate))
        scalars = None
        if self.modern:
            scalars = Scalars(
                [self.resid_lambdas[i].to(dtype) for i in range(len(layers))],
                [self.x0_lambdas[i].to(dtype) for i in range(len(layers))],
                self.smear_lambda.to(dtype),
                self.smear_gate,
                self.backout_lambda.to(dtype),
            )
        return Weights(self.embed, layers, scalars)

    def _value(self, layer: int, idx: Tensor) -> Tensor:
        return self.value_embeds[str(layer)](idx).to(self.compute_dtype)  # type: ignore[no-any-return]

    def hidden(self, idx: Tensor, after: After | None = None, attend_as: AttendAs | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head.

        Tokens `after` others need `attend_as`, which adds the keys and values of those.
        """
        B, T = idx.shape
        cos, sin = self.rope(None if after is None else after.positions, T, idx.device)

        def earlier(x: Tensor) -> Tensor:
            if after is None:
                return F.pad(x[:, :-1], (0, 0, 1, 0))
            return torch.cat((norm(self.embed(after.last))[:, None], x[:, :-1]), dim=1)

        def attend(layer: int, qk: Sequence[Tensor], v: Tensor) -> Tensor:
            attn = self.blocks[layer].attn
            assert isinstance(attn, Attention)
            q, k = qk
            v = v.transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
            if attend_as is None:
                y = attention.causal(q, k, v, attn.window, attn.blocks)
            else:
                y = attend_as(layer, attn.window, q, k, v)
            return y.transpose(1, 2).reshape(B, T, -1)

        scale = self.config.attention_scale
        return forward_pass(
            self.config,
            self.weights(),
            idx,
            earlier=earlier,
            turn=lambda x: turn(x, cos, sin, scale),
            attend=attend,
        )

    def forward(self, idx: Tensor, *, last: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> fp32 logits (B, T, V); with `last` (B,) only those of position last[b] of each
        row, (B, 1, V)."""
        x = self.hidden(idx)
        if last is not None:
            x = x[torch.arange(x.size(0), device=x.device), last][:, None]
        return self.logits(x)

    def logits(self, x: Tensor) -> Tensor:
        """What `hidden` returns (..., C) -> fp32 logits (..., V)."""
        return softcap(self.lm_head(x)[..., : self.config.vocab_size].float())

    def loss(self, idx: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of weights x negative log likelihood, and each token's own (B, T), detached, in nats.

        Targets below 0 count for nothing. Full logits never exist: they are made, used and dropped in slices.
        """
        x = self.hidden(idx)
        head = self.lm_head.weight[: self.config.vocab_size].to(x.dtype)
        total, nll = softcapped_nll(x.flatten(0, 1), head, targets.flatten(), weights.flatten())
        return total, nll.view_as(targets)

    def use_fp8(self) -> "GPT":
        """Multiply the blocks' matrices in 8 bits while training; the head and evaluation stay as they
        are."""
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                module.in_8_bits = fp8.fits(module.in_features, module.out_features)
        return self

    def use_block_masks(self, device: torch.device) -> "GPT":
        """Let a compiled model's sliding windows run in flex_attention's kernel, which knows no backward pass
        on CPUs."""
        T = self.config.sequence_len
        masks = {w: attention.window_blocks(w, T, device) for w in set(self.config.windows()) if w < T - 1}
        for block in self.blocks:
            assert isinstance(block, Block)
            block.attn.blocks = masks.get(block.attn.window)
        return self

    def num_params(self) -> int:
        return sum(p.numel() for p in self.parameters())


def load_model(directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GPT:
    """The model a stage has left in its directory, in evaluation mode; `dtype` is what it computes in."""
    from safetensors.torch import load_file

    config, _ = read_config(directory)
    with torch.device("meta"):
        model = GPT(config)
    weights = load_file(directory / "model.safetensors", device=str(device))
    model.load_state_dict(weights, assign=True)
    if dtype is not None:
        model.compute_dtype = dtype
    return model.eval().requires_grad_(False)


def read_config(directory: Path) -> tuple[GPTConfig, str]:
    """The shape of a saved model and the fingerprint of the tokenizer it was trained with."""
    path = directory / "config.json"
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        return GPTConfig(**{k: v for k, v in fields.items() if k != "tokenizer_fingerprint"}), str(
            fields["tokenizer_fingerprint"]
        )
    except FileNotFoundError:
        raise ValueError(f"{directory} holds no model: config.json is missing") from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{path} does not describe a model of ours ({error})") from None


def write_config(directory: Path, config: GPTConfig, tokenizer_fingerprint: str) -> None:
    text = json.dumps(asdict(config) | {"tokenizer_fingerprint": tokenizer_fingerprint}, indent=1)
    (directory / "config.json").write_text(text + "\n")
