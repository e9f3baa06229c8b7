"""Causal attention: over a whole sequence, inside a sliding window, and against a cache.

Letters: B rows, T new tokens, S cached positions, H heads, D head dimension, w window (how far back a token
looks).
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def causal(q: Tensor, k: Tensor, v: Tensor, window: int, blocks: "BlockMask | None" = None) -> Tensor:
    """Attention of (B, H, T, D) over itself; a token sees itself and at most `window` tokens before it.

    `blocks` says the same for flex_attention's kernel; without torch.compile that would make all T x T
    scores, so it is used only inside a compiled model.
    """
    T = q.size(2)
    if window >= T - 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
    if blocks is not None and blocks.seq_lengths == (T, T) and torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        y = flex_attention(q, k, v, block_mask=blocks, enable_gqa=k.size(1) != q.size(1))
        assert isinstance(y, Tensor)
        return y
    return _banded(q, k, v, window)


def window_blocks(window: int, T: int, device: torch.device) -> "BlockMask":
    """Which blocks of a T x T attention a sliding window touches: flex_attention skips the others."""
    from torch.nn.attention.flex_attention import create_block_mask  # it brings half of torch's compiler

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= query - window)

    return create_block_mask(sees, None, None, T, T, device=str(device))


def _banded(q: Tensor, k: Tensor, v: Tensor, w: int) -> Tensor:
    """The sliding window as blocks of w queries that each see two blocks of keys: work and memory grow with T
    x w, and the only mask is (w, 2w)."""
    B, H, T, D = q.shape
    n = -(-T // w)
    if n * w != T:  # the last block is filled up; causality keeps the filling out of what is returned
        q, k, v = (F.pad(x, (0, 0, 0, n * w - T)) for x in (q, k, v))

    def two_blocks(x: Tensor) -> Tensor:  # (B, Hk, n*w, D) -> (B*n, Hk, 2w, D): the block before, and its own
        x = F.pad(x, (0, 0, w, 0)).unfold(2, 2 * w, w)  # (B, Hk, n, D, 2w)
        return x.permute(0, 2, 1, 4, 3).reshape(B * n, x.size(1), 2 * w, D)

    blocks = q.view(B, H, n, w, D).transpose(1, 2).reshape(B * n, H, w, D)
    r = torch.arange(w, device=q.device)[:, None]
    s = torch.arange(2 * w, device=q.device)[None, :]
    band = (s >= r) & (s <= r + w)  # query r sits at key w + r
    first = band & (s >= w)  # nothing comes before the first block
    mask = band.expand(B, n, w, 2 * w).clone()
    mask[:, 0] = first
    y = F.scaled_dot_product_attention(
        blocks,
        two_blocks(k),
        two_blocks(v),
        attn_mask=mask.view(B * n, 1, w, 2 * w),
        enable_gqa=k.size(1) != H,
    )
    return y.view(B, n, H, w, D).transpose(1, 2).reshape(B, H, n * w, D)[:, :, :T]


def cached(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of new tokens (B, H, T, D) over cached keys (B, Hk, S, D); `seen` (B, T, S) says which each
    may see."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=k.size(1) != q.size(1))
