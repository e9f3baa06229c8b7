"""The model as the engine runs it: the mathematics of `GPT.hidden` in fewer, faster operations.

Weights are fused and laid out once. One pass reads the next token of every running row and pieces of new
prompts together, so that the weights are fetched once for all. At a few rows an operation costs more to start
than to do, so there are as few as can be. The residual stream, norms, rotations, keys and values (on a CPU
also attention) are fp32; matrix products have the model's compute type.

Letters: N tokens of a pass, C width, H heads, D head dimension, S cached positions.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.model import attention
from nanochat_core.model.gpt import GPT, NORM_EPS, Attention, Block, angles
from nanochat_core.model.shape import SMEAR_CHANNELS, VALUE_GATE_CHANNELS

EXACT = 32  # rows up to which a product is made for just so many; above, for a multiple of it


class Piece(NamedTuple):
    """Tokens of one prompt that are read in one pass: cache row, position of the first, how many."""

    row: int
    start: int
    size: int


class Product:
    """x -> x W^T. On a CPU W lies in oneDNN's blocks: several times faster for a few rows than the plain
    layout, and a row's result is the same to the last bit whatever other rows are there."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._weight = weight.detach().to(dtype)
        self._packed = weight.device.type == "cpu" and _has_onednn(dtype)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous(), None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x, "none")

    def relu(self, x: Tensor) -> Tensor:
        return self._apply(x, "relu")

    def _apply(self, x: Tensor, then: str) -> Tensor:
        if self._packed:
            n = len(x)
            if n > EXACT:  # oneDNN takes 0.3 ms to prepare for each new number of rows: let there be few
                x = F.pad(x, (0, 0, 0, -n % EXACT))
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, then, [], "")
            return y[:n]
        y = F.linear(x, self._weight)
        return y.relu_() if then == "relu" else y


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Layer:
    """One block, ready to use."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attn, mlp = block.attn, block.mlp
        assert isinstance(attn, Attention)
        self.window = attn.window
        weights = [_paired(attn.c_q.weight, attn.n_head), _paired(attn.c_k.weight, attn.n_kv_head)]
        self.qkv = Product(torch.cat((*weights, attn.c_v.weight)), dtype)
        self.out = Product(attn.c_proj.weight, dtype)
        self.up = Product(mlp.c_fc.weight, dtype)
        self.down = Product(mlp.c_proj.weight, dtype)
        self.gate = None if attn.ve_gate is None else attn.ve_gate.weight.detach().float()


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows in another order: the two channels that rotate together become neighbours, a complex number.
    Queries and keys are reordered alike, so their products stay."""
    return weight.detach().view(heads, 2, -1, weight.size(1)).transpose(1, 2).reshape(weight.shape)


class _Norm:
    """The model's norm over `size` channels, but for a factor: x / hypot(root mean square, root of eps)."""

    def __init__(self, size: int, device: torch.device, factor: float = 1.0) -> None:
        self._share = factor * size**-0.5
        self._floor = torch.tensor(factor * NORM_EPS**0.5, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True)
        return x / torch.hypot(length if self._share == 1 else length * self._share, self._floor)


class Decoder:
    """A model and the keys and values of what it has read, `rows` sequences of at most `capacity` tokens."""

    def __init__(self, model: GPT, rows: int) -> None:
        self._model = model
        self.config = model.config
        self.rows, self.capacity = rows, 0
        self.device, self._dtype = model.lm_head.weight.device, model.compute_dtype
        # bf16 attention of one query is several times slower than fp32 on a CPU
        self._cache_dtype = torch.float32 if self.device.type == "cpu" else self._dtype
        D = self.config.head_dim
        self._norm = _Norm(self.config.n_embd, self.device)
        self._head_norm = _Norm(D, self.device, D**0.5)  # the rotation makes up for the factor
        scale = (1.0 if model.config.arch == "seed" else 1.2) * D**0.5  # 1.2: as in Attention
        turns = angles(model.config).to(self.device)
        self._rope = torch.polar(torch.full_like(turns, scale), -turns)[:, None]  # (P, 1, D/2)
        self._k = self._v = torch.empty(0)
        self.prepare()

    @torch.inference_mode()
    def prepare(self) -> None:
        """Take over the model's weights as they are now. Embeddings stay the model's own."""
        model = self._model
        self._layers = [_Layer(block, self._dtype) for block in model.blocks if isinstance(block, Block)]
        self._head = Product(model.lm_head.weight, self._dtype)
        if model.modern:
            self._resid: list[float] = model.resid_lambdas.tolist()
            self._from_x0: list[float] = model.x0_lambdas.tolist()
            self._smear, self._backout = model.smear_lambda.item(), model.backout_lambda.item()

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
        width = c.n_kv_head * c.head_dim
        self.row_starts = torch.arange(self.rows, device=self.device) * capacity
        # Of each layer's keys and values two views: (rows, Hk, S, D) to look at, (slots, Hk*D) to write to.
        self._seen_as = [
            (k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self._k, self._v, strict=True)
        ]
        self._slots = [(k.view(-1, width), v.view(-1, width)) for k, v in zip(self._k, self._v, strict=True)]

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
        pieces: Sequence[Piece],
        wanted: Sequence[int] | None,
    ) -> Tensor:
        """Read one token of each running row (rows 0, 1, ...), then the pieces, all in one list.

        `before`: the token before each (-1 if it is the first). `wanted`: after which tokens the logits are
        needed (None: all). They come back (n, V), not yet softcapped: the sampler does that to few.
        """
        idx, at = torch.tensor([tokens, positions], device=self.device)
        x = self._norm(self._embed(self._model.wte.weight, idx))
        if self._model.modern:
            x = self._smeared(x, before)
        rope = self._rope[at]  # (N, 1, D/2)
        view = _View(self, at, positions, pieces)
        x0 = middle = x
        for i, layer in enumerate(self._layers):
            ve = None
            if self._model.modern:
                x = torch.add(x * self._resid[i], x0, alpha=self._from_x0[i])
                if layer.gate is not None:
                    ve = self._embed(self._model.value_embeds[str(i)].weight, idx)  # type: ignore[arg-type]
            x = self._attend(i, layer, x, ve, rope, view)
            h = layer.up.relu(self._norm(x).to(self._dtype))
            x = x + layer.down(h * h)
            if i == self.config.n_layer // 2:
                middle = x
        if self._model.modern:
            x = torch.sub(x, middle, alpha=self._backout)
        if wanted is not None:
            x = x[torch.tensor(wanted, dtype=torch.long, device=self.device)]
        return self._head(self._norm(x).to(self._dtype))[:, : self.config.vocab_size]

    def _embed(self, table: Tensor, idx: Tensor) -> Tensor:
        return F.embedding(idx, table).to(self._dtype).float()

    def _smeared(self, x: Tensor, before: Sequence[int]) -> Tensor:
        """Each token's embedding with some of that of the token before it."""
        idx = torch.tensor(before, device=self.device)
        earlier = self._norm(self._embed(self._model.wte.weight, idx.clamp(min=0))) * (idx >= 0)[:, None]
        weight = self._model.smear_gate.weight.detach().float()
        gate = self._smear * torch.sigmoid(F.linear(x[:, :SMEAR_CHANNELS], weight))
        return torch.addcmul(x, gate, earlier)

    def _attend(
        self, i: int, layer: _Layer, x: Tensor, ve: Tensor | None, rope: Tensor, view: "_View"
    ) -> Tensor:
        c = self.config
        H, D = c.n_head, c.head_dim
        rotated, width = H + c.n_kv_head, (H + c.n_kv_head) * D  # heads and channels of q and k together
        normed = self._norm(x)
        qkv = layer.qkv(normed.to(self._dtype))
        qk, v = qkv[:, :width].view(-1, rotated, D), qkv[:, width:]
        qk = (self._head_norm(qk.float()).view(torch.complex64) * rope).view(torch.float32)
        if ve is not None and layer.gate is not None:
            gate = 3 * torch.sigmoid(F.linear(normed[:, :VALUE_GATE_CHANNELS], layer.gate))  # (N, Hk)
            v = (v.view(len(x), -1, D) + gate[:, :, None] * ve.view(len(x), -1, D)).flatten(1)
        qk, v = qk.to(self._cache_dtype), v.to(self._cache_dtype)
        k = qk[:, H:].flatten(1)
        keys, values = self._slots[i]
        keys.index_copy_(0, view.slots, k)
        values.index_copy_(0, view.slots, v)
        return x + layer.out(view.attend(layer.window, qk[:, :H], k, v, *self._seen_as[i]).to(self._dtype))


class _View:
    """Where the tokens of one pass go in the cache, and what each of them may see there."""

    def __init__(
        self, decoder: Decoder, at: Tensor, positions: Sequence[int], pieces: Sequence[Piece]
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
        """(N, H, D) queries, the new keys and values (N, Hk*D), all cached ones -> (N, H*D)."""
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
                fresh_k, fresh_v = (
                    x[own].view(piece.size, -1, q.size(2)).transpose(0, 1)[None] for x in (k, v)
                )
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

    def _piece_seen(self, piece: Piece, window: int, low: int) -> Tensor:
        """(1, T, S): a token of a prompt sees those before it, as far as the window reaches."""
        if (piece, window) not in self._seen:
            s = torch.arange(low, piece.start + piece.size, device=self._at.device)
            at = torch.arange(piece.start, piece.start + piece.size, device=self._at.device)[:, None]
            self._seen[piece, window] = ((s <= at) & (s >= at - window))[None]
        return self._seen[piece, window]
