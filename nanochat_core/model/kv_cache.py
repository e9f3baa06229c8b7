"""The keys and values of tokens already read: allocated once, every row with a length of its own."""

import torch
from torch import Tensor

from nanochat_core.model.shape import GPTConfig


class KVCache:
    """Room for `capacity` tokens in each of `rows` sequences.

    `select` gives a cache over some of the rows that shares this one's memory, so that one row can be
    prefilled while others decode. `high` bounds the longest row on the host, so that reading a prefix never
    waits for the device.
    """

    def __init__(
        self,
        config: GPTConfig,
        rows: int,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.n_layer, rows, config.n_kv_head, capacity, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, device=device, dtype=torch.long)
        # The normed embedding of each row's last token: `modern` mixes it into the next one (smear).
        self.previous = torch.zeros(rows, config.n_embd, device=device, dtype=dtype)
        self.index: Tensor | None = None  # the rows this view speaks for; None: all, in order
        self._high = [0]  # shared with every view

    @property
    def high(self) -> int:
        return self._high[0]

    @high.setter
    def high(self, value: int) -> None:
        self._high[0] = value

    @property
    def capacity(self) -> int:
        return self.k.size(3)

    def select(self, rows: Tensor) -> "KVCache":
        """The same memory, seen through some rows (a long tensor of row numbers, each once)."""
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__)
        view.index = rows if self.index is None else self.index[rows]
        return view

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget these rows (all of them by default)."""
        if rows is None:
            self.length.zero_()
            self.high = 0
        else:
            self.length[rows] = 0

    # What the model calls: positions, then for each layer `extend`, then `advance`.

    def lengths(self) -> Tensor:
        return self.length if self.index is None else self.length[self.index]

    def positions(self, T: int) -> Tensor:
        """(B, T): where the next T tokens of each row go."""
        start = self.lengths()
        return start[:, None] + torch.arange(T, device=start.device)

    def extend(self, layer: int, k: Tensor, v: Tensor, at: Tensor, high: int) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, D) at positions `at` (B, T); give back all keys and values up to `high`, as (B, H,
        high, D)."""
        keys, values = self.k[layer], self.v[layer]
        rows = torch.arange(at.size(0), device=at.device) if self.index is None else self.index
        keys[rows[:, None], :, at] = k.transpose(1, 2).to(keys.dtype)  # (B, H, T, D) -> (B, T, H, D)
        values[rows[:, None], :, at] = v.transpose(1, 2).to(values.dtype)
        if self.index is None:
            return keys[:, :, :high], values[:, :, :high]
        return keys[self.index, :, :high], values[self.index, :, :high]

    def advance(self, count: Tensor, last: Tensor) -> None:
        """Each row has read `count` (B,) more tokens, the last of them with the embedding `last` (B, C)."""
        if self.index is None:
            self.length += count
            self.previous.copy_(last)
        else:
            self.length[self.index] += count
            self.previous[self.index] = last.to(self.previous.dtype)
