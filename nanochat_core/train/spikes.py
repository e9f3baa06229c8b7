"""Whether a step's loss or gradient norm stands out from those before it."""

import statistics
from collections.abc import Sequence

WINDOW = 128  # steps that are looked back at, as in OLMo-core
LEAST = 32  # steps before anything is judged


def robust_z(history: Sequence[float], value: float) -> float:
    """How many standard deviations a value lies above the median, estimated by the median deviation, which
    outliers do not move. 0 where half of the history is one number."""
    middle = statistics.median(history)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in history)  # of a normal distribution
    return (value - middle) / deviation if deviation else 0.0


def spikes(history: Sequence[Sequence[float]], now: Sequence[float], limit: float) -> bool:
    """Whether one of several numbers is further above its own history than the limit."""
    if len(history) < LEAST:
        return False
    return any(
        robust_z(past, value) > limit for past, value in zip(zip(*history, strict=True), now, strict=True)
    )
