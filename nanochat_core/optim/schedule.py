"""Rates, and how they move over a run: pure functions of the step. Multipliers of the learning rate lie in
[0, 1]."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Learning rates and decay of a run, before any scaling."""

    matrix: float = 0.02
    embedding: float = 0.3
    value_embedding: float = 0.15
    unembedding: float = 0.008
    weight_decay: float = 0.28  # of the matrices
    scale: float = 1.0  # for the batch: sqrt(batch / 2^19 tokens), of all rates but the smear's and backout's
    stage: float = 1.0  # of all rates


@dataclass(frozen=True)
class Schedule:
    """Warm up, hold, then fall linearly over the last `warmdown` of the run to `final`."""

    warmup_steps: int = 40
    warmdown: float = 0.65
    final: float = 0.05
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)  # at first, warmed up, at the very end
    momentum_warmup: int = 400  # steps

    def lr(self, step: int, steps: int) -> float:
        """The multiplier for the update that leads from `step` to `step + 1` of `steps`."""
        rising = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return rising * (self.final + (1 - self.final) * self._left(step, steps))

    def muon_momentum(self, step: int, steps: int) -> float:
        first, warm, last = self.momentum
        rising = min(1.0, step / max(1, min(self.momentum_warmup, steps // 2)))
        value = first + (warm - first) * rising
        return value + (last - value) * (1 - self._left(step, steps))

    def weight_decay(self, step: int, steps: int) -> float:
        """A cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))

    def _left(self, step: int, steps: int) -> float:
        """1 until the warmdown begins, then linearly to 0 at the end."""
        if not self.warmdown:
            return 1.0
        return max(0.0, min(1.0, (steps - step) / max(1.0, self.warmdown * steps)))
