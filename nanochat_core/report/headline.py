"""The one number that a finished stage is known by."""

from nanochat_core.artifacts.stage import Metrics
from nanochat_core.report.published import core_name

# What a finished stage is known by: the first of these that it measured.
HEADLINES: tuple[tuple[str, str], ...] = (
    ("reward", "reward {:.3f}"),
    ("chatcore", "ChatCORE {:.3f}"),
    ("core", "{name} {:.3f}"),
    ("val_bpb", "{:.3f} bits/byte"),
    ("bytes_per_token", "{:.2f} bytes/token"),
    ("documents", "{:,.0f} documents"),
    ("vocab_size", "{:,.0f} tokens"),
    ("params", "{:,.0f} parameters"),
)


def headline(metrics: Metrics) -> str:
    """The one number of a stage, with where it came from if that is known: "reward 0.760 -> 0.870"."""
    for key, form in HEADLINES:
        value, start = metrics.get(key), metrics.get(f"{key}_start")
        if isinstance(value, int | float):
            text = form.format(value, name=core_name(metrics))
            if isinstance(start, int | float):
                number = f"{value:.3f}"
                text = text.replace(number, f"{start:.3f} -> {number}")
            return text
    return ""
