"""How far a stage is, in words: a line of its metrics and the time left."""

from collections import deque
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]


def span(seconds: float) -> str:
    """A length of time as people say it: 0.4 s, 48 s, 3:20 min, 5:04 h, 9.3 days."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    if whole < 48 * 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{seconds / 86400:.1f} days"


def count(n: float) -> str:
    """A large number, short: 950, 12.4 k, 73.5 M, 1.9 T."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g} {letter}"
    return f"{n:g}"


def power(n: float) -> str:
    """FLOPs as their literature writes them: 1.0e19."""
    return f"{n:.2e}".replace("e+", "e")


class Pace:
    """Time left, from how fast the last steps went."""

    def __init__(self) -> None:
        self.seen: deque[tuple[float, float]] = deque(maxlen=100)  # (time, step)

    def see(self, row: Row) -> float | None:
        """Take a row in; seconds left after it, or None as long as that cannot be said."""
        step, steps, now = float(row["step"]), float(row["steps"]), float(row["time"])
        if self.seen and step < self.seen[-1][1]:
            self.seen.clear()  # went back to a checkpoint
        self.seen.append((now, step))
        begin, first = self.seen[0]
        return (steps - step) * (now - begin) / (step - first) if step > first else None


def is_progress(row: Row) -> bool:
    """Whether a row says where a stage stands: a foreign or half line is passed over, never trusted."""
    numbers = (row.get(key) for key in ("step", "steps", "time"))
    return all(isinstance(n, int | float) for n in numbers) and row["steps"] > 0


def describe(row: Row, left: float | None) -> str:
    """One row in words: "120/400  30%  loss 4.21  8.1 k tok/s  3:20 min left"."""
    words = [f"{row['step']:g}/{row['steps']:g}", f"{100 * row['step'] / row['steps']:.0f}%"]
    words += [
        form.format(row[key])
        for key, form in (
            ("loss", "loss {:.3f}"),
            ("val_bpb", "{:.3f} bits/byte"),
            ("reward", "reward {:.3f}"),
        )
        if isinstance(row.get(key), int | float)
    ]
    if isinstance(row.get("tokens_per_s"), int | float):
        words.append(f"{count(row['tokens_per_s'])} tok/s")
    if "waiting" in row:
        words.append(str(row["waiting"]))
    if left is not None and row["step"] < row["steps"]:
        words.append(f"{span(left)} left")
    return "  ".join(words)


class News:
    """What of a stage's rows is worth a line of its own: a note, and that a wait has begun."""

    def __init__(self) -> None:
        self.waiting = False

    def __call__(self, row: Row) -> str | None:
        before, self.waiting = self.waiting, "waiting" in row
        if self.waiting and not before:
            return f"{row['waiting']}; Ctrl-C loses nothing, the same command goes on"
        return f"note: {row['note']}" if "note" in row else None
