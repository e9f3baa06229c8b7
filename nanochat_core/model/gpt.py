"""The model: a decoder with rotary positions, QK-norm, relu^2 and untied, softcapped logits, in two presets.

`seed` is nanochat's model of November 2025, the one `transformers` calls NanoChat. `modern` is that of July
2026: it adds value embeddings, learned residual scalars, smear, backout and sliding windows.

Letters: B rows, T tokens, C width, H heads, D head dimension, V vocabulary.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.model import attention, fp8
from nanochat_core.model.cross_entropy import softcapped_nll
from nanochat_core.model.kv_cache import KVCache
from nanochat_core.model.shape import SMEAR_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SOFTCAP = 15.0
NORM_EPS = 1e-6


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


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, D), first half of D against the second."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def angles(config: GPTConfig) -> Tensor:
    """How far each pair of channels turns at each position (P, D/2)."""
    D = config.head_dim
    inverse = config.rope_base ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    return torch.arange(config.positions, dtype=torch.float32)[:, None] * inverse


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.window = config.windows()[layer]
        self.blocks: BlockMask | None = None
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.scale = 1.0 if config.arch == "seed" else 1.2  # sharper attention than QK-norm alone allows
        C = config.n_embd
        self.c_q = Linear(C, self.n_head * self.head_dim)
        self.c_k = Linear(C, self.n_kv_head * self.head_dim)
        self.c_v = Linear(C, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(self.n_head * self.head_dim, C)
        self.ve_gate = (
            Linear(VALUE_GATE_CHANNELS, self.n_kv_head) if config.has_value_embedding(layer) else None
        )

    def forward(
        self, x: Tensor, ve: Tensor | None, rope: tuple[Tensor, Tensor], past: "_Past | None"
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)  # (B, T, H, D) -> (B, H, T, D)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None:
            assert ve is not None
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, Hk)
            v = v + gate[..., None] * ve.view(B, T, self.n_kv_head, self.head_dim)
        v = v.transpose(1, 2)
        q, k = norm(rotate(q, *rope)), norm(rotate(k, *rope))
        if self.scale != 1.0:
            q, k = q * self.scale, k * self.scale
        if past is None:
            y = attention.causal(q, k, v, self.window, self.blocks)
        else:
            y = past.attend(self.layer, self.window, q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.c_fc = Linear(C, 4 * C)
        self.c_proj = Linear(4 * C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config.n_embd)

    def forward(
        self, x: Tensor, ve: Tensor | None, rope: tuple[Tensor, Tensor], past: "_Past | None"
    ) -> Tensor:
        x = x + self.attn(norm(x), ve, rope, past)
        return x + self.mlp(norm(x))  # type: ignore[no-any-return]


class _Past:
    """One forward pass against a cache: where the new tokens go and what each of them may see."""

    def __init__(self, cache: KVCache, T: int) -> None:
        self.cache = cache
        self.at = cache.positions(T)  # (B, T)
        self.high = min(cache.high + T, cache.capacity)
        self._seen: dict[int, Tensor] = {}

    def attend(self, layer: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.extend(layer, k, v, self.at, self.high)
        y = attention.cached(q.to(keys.dtype), keys, values, self.seen(window))
        return y.to(q.dtype)

    def seen(self, window: int) -> Tensor:
        if window not in self._seen:
            s = torch.arange(self.high, device=self.at.device)
            at = self.at[:, :, None]
            self._seen[window] = (s <= at) & (s >= at - window)
        return self._seen[window]


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

    def hidden(self, idx: Tensor, cache: KVCache | None = None, count: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head. With a cache, `count` (B,) new tokens of
        each row are real."""
        T = idx.size(1)
        past = None if cache is None else _Past(cache, T)
        rope = self.rope(None if past is None else past.at, T, idx.device)
        x = norm(self.wte(idx).to(self.compute_dtype))
        embedded = x
        if self.modern:
            if cache is None:
                before = F.pad(x[:, :-1], (0, 0, 1, 0))  # the token before each; nothing before the first
            else:
                stored = cache.previous if cache.index is None else cache.previous[cache.index]
                stored = stored.to(x.dtype) * (cache.lengths() > 0)[:, None]
                before = torch.cat((stored[:, None], x[:, :-1]), dim=1)
            gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))
            x = x + gate * before
        x0 = middle = x
        for i, block in enumerate(self.blocks):
            ve = None
            if self.modern:
                x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
                if str(i) in self.value_embeds:
                    ve = self.value_embeds[str(i)](idx).to(x.dtype)
            x = block(x, ve, rope, past)
            if i == self.config.n_layer // 2:
                middle = x
        if self.modern:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if cache is not None:
            if count is None:
                count = torch.full((idx.size(0),), T, device=idx.device)
            cache.advance(count, embedded[torch.arange(idx.size(0), device=idx.device), count - 1])
            cache.high = min(cache.high + T, cache.capacity)
        return norm(x)

    def forward(self, idx: Tensor, *, cache: KVCache | None = None, last: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> fp32 logits (B, T, V); with `last` (B,) only those of position last[b] of each
        row, (B, 1, V).

        With a cache the tokens follow those already read; rows shorter than T are padded on the right and
        `last` says where each really ends.
        """
        x = self.hidden(idx, cache, None if last is None else last + 1)
        if last is not None:
            x = x[torch.arange(x.size(0), device=x.device), last][:, None]
        logits = self.lm_head(x)[..., : self.config.vocab_size].float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)

    def loss(self, idx: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of weights x negative log likelihood, and each token's own (B, T), detached, in nats.

        Targets below 0 count for nothing. Full logits never exist: they are made, used and dropped in slices.
        """
        x = self.hidden(idx)
        head = self.lm_head.weight[: self.config.vocab_size].to(x.dtype)
        total, nll = softcapped_nll(x.flatten(0, 1), head, targets.flatten(), weights.flatten(), SOFTCAP)
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
