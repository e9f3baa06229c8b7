"""From logits to tokens, for many rows at once, each with its own temperature, limits and random numbers."""

from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How one answer is drawn. Temperature 0 takes the likeliest token and uses no randomness."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0

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

    `cap` softens the logits to cap*tanh(logits/cap), as the model would have done. That changes no order, so
    it waits until few are left: a tanh over the whole vocabulary costs more than a layer.
    """

    def __init__(self, rows: list[Sampling], device: torch.device, cap: float | None = None) -> None:
        self._cap = cap
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

    def __call__(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Tokens (n,) for logits (n, V) and one random number in [0, 1) for each row."""
        if len(self._groups) == 1:
            _, greedy, top_k, temperature, top_p = self._groups[0]
            return logits.argmax(1) if greedy else self._draw(logits, uniform, temperature, top_k, top_p)
        tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        for index, greedy, top_k, temperature, top_p in self._groups:
            assert index is not None
            own = logits[index]
            drawn = own.argmax(1) if greedy else self._draw(own, uniform[index], temperature, top_k, top_p)
            tokens[index] = drawn
        return tokens

    def _draw(
        self, logits: Tensor, uniform: Tensor, temperature: Tensor, top_k: int | None, top_p: Tensor | None
    ) -> Tensor:
        """Invert each row's cumulative distribution at its random number: no noise over the vocabulary."""
        ids: Tensor | None = None
        if top_k is not None or top_p is not None:
            vocab = logits.size(1)
            logits, ids = logits.topk(min(top_k or vocab, vocab), dim=1)  # sorted, best first
        logits = logits.float()
        if self._cap is not None:
            logits = self._cap * torch.tanh(logits / self._cap)
        probabilities = torch.softmax((logits - logits.amax(1, keepdim=True)) / temperature, dim=1)
        if top_p is not None:
            before = probabilities.cumsum(1) - probabilities
            probabilities = probabilities.masked_fill(before >= top_p, 0)
        cumulative = probabilities.cumsum(1, dtype=torch.float64)
        target = uniform[:, None] * cumulative[:, -1:]
        place = torch.searchsorted(cumulative, target, right=True)  # the first beyond: never a zero one
        place.clamp_(max=cumulative.size(1) - 1)
        return (place if ids is None else ids.gather(1, place)).squeeze(1)
