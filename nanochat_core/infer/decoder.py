"""The model as the engine runs it: its `forward_pass` with packed weights and a cache of keys and values.

Weights are fused and laid out once. One pass reads the next token of every running row and pieces of new
prompts together, so that the weights are fetched once for all. At a few rows an operation costs more to start
than to do, so there are as few as can be. The residual stream, norms, rotations, keys and values (on a CPU
also attention) are fp32; matrix products have the model's compute type.

Letters: N tokens of a pass, C width, H heads, Hk key heads, D head dimension, S cached positions.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_core.infer.sampling import shifted_softcap
from nanochat_core.model import attention
from nanochat_core.model.forward import (
    NORM_EPS,
    SOFTCAP,
    Function,
    Layer,
    Scalars,
    Weights,
    angles,
    forward_pass,
    rotate,
    softcap,
)
from nanochat_core.model.gpt import GPT, Block
from nanochat_core.model.shape import GPTConfig

EXACT = 32  # rows up to which a product is made for just so many; above, for a multiple of it


class PromptChunk(NamedTuple):
    """Tokens of one prompt that are read in one pass: cache row, position of the first, how many."""

    row: int
    start: int
    size: int


class Product:
    """x -> x W^T. On a CPU W lies in oneDNN's blocks: several times faster for a few rows than the plain
    layout, and a row's result is the same to the last bit whatever other rows are there."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weight = weight.detach().to(dtype)
        self._packed = weight.device.type == "cpu" and _has_onednn(dtype)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if not self._packed:
            return F.linear(x, self._weight)
        n = len(x)
        if n <= EXACT:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")  # type: ignore[no-any-return]
        # oneDNN takes 0.3 ms to prepare for each new number of rows: let there be few
        x = F.pad(x, (0, 0, 0, -n % EXACT))
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")[:n]  # type: ignore[no-any-return]


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows in another order: the two channels that rotate together become neighbours, a complex number.
    Queries and keys are reordered alike, so their products stay."""
    return weight.detach().view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


def _turns(config: GPTConfig) -> Tensor:
    """What queries and keys are multiplied by as complex numbers (P, 1, D/2): where `rotate` takes the first
    of each pair of channels."""
    turns = angles(config)
    first = torch.cat((torch.ones_like(turns), torch.zeros_like(turns)), dim=-1)
    real, imag = rotate(first, turns.cos(), turns.sin()).chunk(2, dim=-1)
    return torch.complex(real, imag)[:, None] * config.attention_scale


class _Norm:
    """The model's norm over `size` channels, but for a factor: x / hypot(root mean square, root of eps)."""

    def __init__(self, size: int, device: torch.device, factor: float = 1.0) -> None:
        self._share = factor * size**-0.5
        self._floor = torch.tensor(factor * NORM_EPS**0.5, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return x / torch.hypot(length if self._share == 1 else length * self._share, self._floor)


class Decoder:
    """A model and the keys and values of what it has read, `rows` sequences of at most `capacity` tokens.

    Its own forms of norm and rotation, and its cache, are compared with the model's when the first
    decoder is built.
    """

    def __init__(self, model: GPT, rows: int, *, compare: bool = True) -> None:
        if compare:
            compare_with_model(model.config.arch, model.lm_head.weight.device)
        self._model = model
        self.config = model.config
        self.rows, self.capacity = rows, 0
        self.device, self._dtype = model.lm_head.weight.device, model.compute_dtype
        # bf16 attention of one query is several times slower than fp32 on a CPU
        self._cache_dtype = torch.float32 if self.device.type == "cpu" else self._dtype
        D = self.config.head_dim
        self._norm = _Norm(self.config.n_embd, self.device)
        self._head_norm = _Norm(D, self.device, D**0.5)  # the rotation makes up for the factor
        self._rope = (_turns(self.config) * D**0.5).to(self.device)
        self._k = self._v = torch.empty(0)
        self.prepare()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Take over the model's weights as they are now. Embeddings stay the model's own."""
        model, scalars = self._model, None
        self._head: Function = Product(model.lm_head.weight, self._dtype)
        layers = [self._layer(i, block) for i, block in enumerate(model.blocks) if isinstance(block, Block)]
        self._windows = self.config.windows()
        if model.modern:
            scalars = Scalars(
                model.resid_lambdas.tolist(),
                model.x0_lambdas.tolist(),
                model.smear_lambda.item(),
                functools.partial(F.linear, weight=model.smear_gate.weight.detach().float()),
                model.backout_lambda.item(),
            )
        self._weights = Weights(self._embedding(model.wte.weight), layers, scalars)

    def _layer(self, i: int, block: Block) -> Layer:
        attn, mlp, dtype = block.attn, block.mlp, self._dtype
        c, D = self.config, self.config.head_dim
        rotated, width = c.n_head + c.n_kv_head, (c.n_head + c.n_kv_head) * D  # of q and k together
        paired = [_paired(attn.c_q.weight, c.n_head), _paired(attn.c_k.weight, c.n_kv_head)]
        qkv = Product(torch.cat((*paired, attn.c_v.weight)), dtype)

        def heads(x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
            y = qkv(x)
            return (y[:, :width].view(-1, rotated, D),), y[:, width:].view(-1, c.n_kv_head, D)

        value = gate = None
        if attn.ve_gate is not None:
            value = self._embedding(self._model.value_embeds[str(i)].weight)  # type: ignore[arg-type]
            gate = functools.partial(F.linear, weight=attn.ve_gate.weight.detach().float())
        out, up, down = (Product(x.weight, dtype) for x in (attn.c_proj, mlp.c_fc, mlp.c_proj))
        return Layer(heads, out, up, down, value, gate)

    def _embedding(self, table: Tensor) -> Function:
        return lambda idx: F.embedding(idx, table).to(self._dtype).float()

    @torch.inference_mode()
    def reserve(self, capacity: int) -> None:
        """Room for so many tokens in every row; what is there already stays."""
        c, old_k, old_v = self.config, self._k, self._v
        shape = (c.n_layer, self.rows, capacity, c.n_kv_head, c.head_dim)
        self._k, self._v = (
            torch.zeros(shape, device=self.device, dtype=self._cache_dtype) for _ in range(2)
        )  # zeros: what nobody has written is masked, and 0 x NaN would not be 0
        if self.capacity:
            self._k[:, :, : self.capacity], self._v[:, :, : self.capacity] = old_k, old_v
        self.capacity = capacity
        slots = (-1, c.n_kv_head, c.head_dim)
        self.row_starts = torch.arange(self.rows, device=self.device) * capacity
        # Of each layer's keys and values two views: (rows, Hk, S, D) to look at, (slots, Hk, D) to write to.
        self._seen_as = [
            (k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self._k, self._v, strict=True)
        ]
        self._slots = [(k.view(slots), v.view(slots)) for k, v in zip(self._k, self._v, strict=True)]

    @torch.inference_mode()
    def copy(self, source: int, target: int, count: int) -> None:
        """The first tokens of one row, to another row."""
        for cache in (self._k, self._v):
            cache[:, target, :count] = cache[:, source, :count]

    @torch.inference_mode()
    def read(
        self,
        tokens: Sequence[int],
        before: Sequence[int],
        positions: Sequence[int],
        pieces: Sequence[PromptChunk],
        wanted: Sequence[int] | None,
    ) -> Tensor:
        """Read one token of each running row (rows 0, 1, ...), then the pieces, all in one list.

        `before`: the token before each (-1 if it is the first). `wanted`: after which tokens the logits are
        needed (None: all). They come back (n, V), not yet softcapped: the sampler does that to few.
        """
        idx, at = torch.tensor([tokens, positions], device=self.device)
        rope = self._rope[at]  # (N, 1, D/2)
        view = _View(self, at, positions, pieces)
        H = self.config.n_head

        def earlier(_: Tensor) -> Tensor:
            ids = torch.tensor(before, device=self.device)
            return self._norm(self._weights.embed(ids.clamp(min=0))) * (ids >= 0)[:, None]

        def turn(qk: Tensor) -> Tensor:
            turned: Tensor = self._head_norm(qk.float()).view(torch.complex64) * rope
            return turned.view(torch.float32)

        def attend(layer: int, parts: Sequence[Tensor], v: Tensor) -> Tensor:
            (qk,) = parts
            qk, v = qk.to(self._cache_dtype), v.to(self._cache_dtype)
            q, k = qk[:, :H], qk[:, H:]
            keys, values = self._slots[layer]
            keys.index_copy_(0, view.slots, k)
            values.index_copy_(0, view.slots, v)
            return view.attend(self._windows[layer], q, k, v, *self._seen_as[layer])

        x = forward_pass(
            self.config, self._weights, idx, earlier=earlier, turn=turn, attend=attend, norm=self._norm
        )
        if wanted is not None:
            x = x[torch.tensor(wanted, dtype=torch.long, device=self.device)]
        return self._head(x)[:, : self.config.vocab_size]


class _View:
    """Where the tokens of one pass go in the cache, and what each of them may see there."""

    def __init__(
        self, decoder: Decoder, at: Tensor, positions: Sequence[int], pieces: Sequence[PromptChunk]
    ) -> None:
        self.pieces = pieces
        self.running = n = len(positions) - sum(piece.size for piece in pieces)
        starts = decoder.row_starts
        if pieces:
            rows = [*range(n), *(piece.row for piece in pieces for _ in range(piece.size))]
            starts = starts[torch.tensor(rows, device=at.device)]
        self.slots = starts[: len(positions)] + at
        self._at = at[:n]
        self._first, self._last = min(positions[:n], default=0), max(positions[:n], default=0)
        self._dtype = decoder._cache_dtype
        self._gqa = decoder.config.n_kv_head != decoder.config.n_head
        self._seen: dict[Any, Tensor] = {}

    def attend(self, window: int, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(N, H, D) queries, the new keys and values (N, Hk, D), all cached ones -> (N, H*D)."""
        parts = []
        n = self.running
        if n:
            low = max(0, self._first - window)
            size = self._last + 1 - low
            y = F.scaled_dot_product_attention(
                q[:n].unsqueeze(2),
                keys.narrow(0, 0, n).narrow(2, low, size),
                values.narrow(0, 0, n).narrow(2, low, size),
                attn_mask=None if self._first == self._last else self._running_seen(window, low),
                enable_gqa=self._gqa,
            )  # (n, H, 1, D)
            parts.append(y.reshape(n, -1))
        for piece in self.pieces:
            own, n = slice(n, n + piece.size), n + piece.size
            heads = q[own].transpose(0, 1)[None]  # (T, H, D) -> (1, H, T, D)
            if piece.start == 0:
                fresh_k, fresh_v = (x[own].transpose(0, 1)[None] for x in (k, v))
                y = attention.causal(heads, fresh_k, fresh_v, window)
            else:
                low, high = max(0, piece.start - window), piece.start + piece.size
                row_keys, row_values = (x[piece.row, None, :, low:high] for x in (keys, values))
                y = attention.cached(heads, row_keys, row_values, self._piece_seen(piece, window, low))
            parts.append(y[0].transpose(0, 1).flatten(1))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _running_seen(self, window: int, low: int) -> Tensor:
        """(n, 1, 1, S), added to the scores: a running row's token sees what its own row has read."""
        if window not in self._seen:
            s, at = torch.arange(low, self._last + 1, device=self._at.device), self._at[:, None]
            hidden = (s > at) | (s < at - window)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=s.device)
            self._seen[window] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self._seen[window]

    def _piece_seen(self, piece: PromptChunk, window: int, low: int) -> Tensor:
        """(1, T, S): a token of a prompt sees those before it, as far as the window reaches."""
        if (piece, window) not in self._seen:
            s = torch.arange(low, piece.start + piece.size, device=self._at.device)
            at = torch.arange(piece.start, piece.start + piece.size, device=self._at.device)[:, None]
            self._seen[piece, window] = ((s <= at) & (s >= at - window))[None]
        return self._seen[piece, window]


# What a decoder computes before each of its products.
_PARTS = {
    "heads": "the residual stream (before layer 0: embedding and smear) or its norm",
    "out": "attention: rotation, norms, scale, value gate, window or cache",
    "up": "the norm before the MLP",
    "down": "the activation",
}


@functools.cache
@torch.inference_mode()
def compare_with_model(arch: Literal["seed", "modern"], device: torch.device) -> None:
    """Read a few tokens with a tiny model and with its decoder; ValueError says where they part.

    The decoder's code is what is compared, not a model's weights: once in a process is enough.
    """
    config = GPTConfig(arch, sequence_len=4, vocab_size=64, n_layer=4, n_head=4, n_kv_head=2, n_embd=32)
    model = GPT(config).init_weights(0).eval()
    rng = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        # So small an embedding, query and key that the epsilon of their norms matters.
        size = 1e-3 if name.endswith(("wte.weight", "c_q.weight", "c_k.weight")) else 1.0
        weight.copy_(size * torch.randn(weight.shape, generator=rng) / weight.size(-1) ** 0.5)
    model.to(device)
    decoder = Decoder(model, 1, compare=False)
    decoder.reserve(16)
    wanted: dict[str, Tensor] = {}  # what each product is given
    found: dict[str, list[Tensor]] = {}

    def watch(place: str, module: nn.Module, product: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        module.register_forward_pre_hook(lambda _, args: wanted.update({place: args[0][0]}))

        def watched(x: Tensor) -> Any:
            found.setdefault(place, []).append(x)
            return product(x)

        return watched

    layers = []
    for i, (block, layer) in enumerate(zip(model.blocks, decoder._weights.layers, strict=True)):
        assert isinstance(block, Block)
        modules = (block.attn.c_q, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        watched = {
            part: watch(f"layer {i}: {what}", module, getattr(layer, part))
            for (part, what), module in zip(_PARTS.items(), modules, strict=True)
        }
        layers.append(layer._replace(**watched))
    decoder._weights = decoder._weights._replace(layers=layers)
    decoder._head = watch("after the last layer: backout or the norm", model.lm_head, decoder._head)
    ids = torch.randint(config.vocab_size, (9,), generator=rng).tolist()
    wanted["logits"] = model(torch.tensor([ids], device=device))[0]
    for start, stop in ((0, 5), (5, 8), (8, 9)):  # a prompt, its rest, and a token of a running row
        pieces = [PromptChunk(0, start, stop - start)] if stop < len(ids) else []
        logits = decoder.read(ids[start:stop], [-1, *ids][start:stop], range(start, stop), pieces, None)
        found.setdefault("logits", []).append(softcap(logits))
    wanted["softcap"] = softcap(logits * 9)
    found["softcap"] = [shifted_softcap(logits * 9) - SOFTCAP]
    for place, parts in found.items():
        off = (torch.cat(parts) - wanted[place]).abs().max() / wanted[place].abs().max()
        if not off < 0.02:  # products in TF32 are less exact than fp32
            raise ValueError(
                f"decoding would differ from the model by {off:.0%} in {place}; "
                "nanochat_core/infer/decoder.py must do what nanochat_core/model/forward.py does"
            )
