"""From logits to tokens, for many rows at once, each with its own temperature, limits and random numbers."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_core.model.forward import SOFTCAP

BLOCK = 128  # of the vocabulary, when only a few tokens of it matter


class Sampling(NamedTuple):
    """How one answer is drawn. Temperature 0 takes the likeliest token and uses no randomness."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    stop: tuple[int, ...] = ()  # tokens that end the answer, beside those that end a turn

    def check(self) -> "Sampling":
        """Itself, or a ValueError that says which value makes no sense."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1 (leave it out for no limit)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must be at least 1")
        return self


def uniforms(seed: int, count: int) -> Tensor:
    """The random numbers of one answer, one for each token; the first ones do not depend on `count`."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.rand(count, generator=generator, dtype=torch.float64)


class Sampler:
    """Chooses the next token of each row of a batch; built anew when rows join or leave.

    A row's token depends on its own logits, settings and random number only, never on its neighbours: rows
    with the same cut-offs are drawn together, and each draw inverts the row's own cumulative distribution.
    The vocabulary is looked at in blocks, the best block or the drawn one then token by token.

    With `raw` logits, those of the decoder, the model's softcap is still to be applied. It changes no order,
    so it waits until few are left.
    """

    def __init__(self, rows: list[Sampling], device: torch.device, *, raw: bool = False) -> None:
        self._raw = raw
        self.random = any(sampling.temperature for sampling in rows)
        kinds: dict[tuple[bool, int | None, bool], list[int]] = {}
        for row, sampling in enumerate(rows):
            greedy = sampling.temperature == 0
            cut = sampling.top_p < 1
            kinds.setdefault((greedy, None if greedy else sampling.top_k, not greedy and cut), []).append(row)
        self._groups: list[tuple[Tensor | None, bool, int | None, Tensor, Tensor | None]] = []
        for (greedy, top_k, cut), members in kinds.items():
            index = None if len(kinds) == 1 else torch.tensor(members, device=device)
            temperature = torch.tensor([[rows[row].temperature] for row in members], device=device)
            top_p = torch.tensor([[rows[row].top_p] for row in members], device=device) if cut else None
            self._groups.append((index, greedy, top_k, temperature, top_p))

    def __call__(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Tokens (n,) for logits (n, V) and one random number in [0, 1) for each row, if any is random."""
        logits = logits.float()
        if len(self._groups) == 1:
            _, greedy, top_k, temperature, top_p = self._groups[0]
            return best(logits) if greedy else self._draw(logits, uniform, temperature, top_k, top_p)
        tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for index, greedy, top_k, temperature, top_p in self._groups:
            assert index is not None and uniform is not None
            own = logits[index]
            tokens[index] = (
                best(own) if greedy else self._draw(own, uniform[index], temperature, top_k, top_p)
            )
        return tokens

    def _draw(
        self,
        logits: Tensor,
        uniform: Tensor | None,
        temperature: Tensor,
        top_k: int | None,
        top_p: Tensor | None,
    ) -> Tensor:
        """Invert each row's cumulative distribution at its random number: no noise over the vocabulary."""
        assert uniform is not None
        ids: Tensor | None = None
        if top_k is not None or top_p is not None:
            logits, ids = _top(logits, min(top_k or logits.size(1), logits.size(1)))
        if self._raw:
            logits = shifted_softcap(logits)
        probabilities = torch.softmax((logits - logits.amax(1, keepdim=True)) / temperature, dim=1)
        if top_p is not None:
            before = probabilities.cumsum(1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0)
        if ids is not None:
            return ids.gather(1, _invert(probabilities, uniform[:, None])[0]).squeeze(1)
        blocks = _blocks(probabilities, 0.0)
        block, rest = _invert(blocks.sum(2), uniform[:, None])
        place, _ = _invert(_of(blocks, block).squeeze(1), rest)
        return (block * BLOCK + place).squeeze(1)


def shifted_softcap(logits: Tensor) -> Tensor:
    """The model's softcap + SOFTCAP, a constant that softmax ignores: tanh(x) = 2 sigmoid(2x) - 1, and on a
    CPU sigmoid is several times faster."""
    return torch.sigmoid(logits * (2 / SOFTCAP)) * (2 * SOFTCAP)


def best(logits: Tensor) -> Tensor:
    """The first of the highest in each row: what argmax gives, many times faster over a vocabulary."""
    blocks = _blocks(logits, -torch.inf)
    block = blocks.amax(2).argmax(1, keepdim=True)
    inside = _of(blocks, block).argmax(2)
    return (block * BLOCK + inside).squeeze(1)


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row, best first, and where they are: in the k blocks that have the highest."""
    blocks = _blocks(logits, -torch.inf)
    if k >= blocks.size(1):
        values, ids = logits.topk(k, dim=1)
        return values, ids
    block = blocks.amax(2).topk(k, dim=1).indices  # (n, k)
    values, at = _of(blocks, block).flatten(1).topk(k, dim=1)
    return values, block.gather(1, at // BLOCK) * BLOCK + at % BLOCK


def _blocks(x: Tensor, filling: float) -> Tensor:
    """(n, V) -> (n, V / BLOCK, BLOCK), the last block filled up."""
    missing = -x.size(1) % BLOCK
    return (F.pad(x, (0, missing), value=filling) if missing else x).view(len(x), -1, BLOCK)


def _of(blocks: Tensor, which: Tensor) -> Tensor:
    """Blocks `which` (n, m) of each row: (n, m, BLOCK)."""
    return blocks.gather(1, which[:, :, None].expand(-1, -1, BLOCK))


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's cumulative weight (n, m) passes the share `uniform` (n, 1) of its whole, and how far
    into that place, in [0, 1). A place of weight 0 is never met."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    target = uniform * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True)  # the first beyond
    place.clamp_(max=weights.size(1) - 1)
    inside = weights.gather(1, place).double()
    rest = (target - (cumulative.gather(1, place) - inside)) / inside
    return place, rest.clamp(0, 1 - 2**-53)
