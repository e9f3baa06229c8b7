"""How far a stage is, in words: a line of its metrics, the time left, its last number; a terminal's view."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

from nanochat_core.published import core_name
from nanochat_core.stage import Metrics

Row = Mapping[str, Any]

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


class Terminal:
    """What a person sees of a run at a terminal: a bar for the stage at work, a line for each that is done.

    Where nobody watches (no terminal) there is no bar, only a line when a stage starts and one when it ends.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stderr
        self.bars = self.out.isatty()
        self.cached: list[str] = []

    def say(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def found(self, name: str) -> None:
        """A stage was there already; these are summed up in one line."""
        self.cached.append(name)

    def sum_up(self) -> None:
        if self.cached:
            self.say(f"cached     {', '.join(self.cached)}")
            self.cached = []

    @contextlib.contextmanager
    def stage(self, name: str, why: str, result: Callable[[], Metrics]) -> Iterator[Callable[[Row], None]]:
        """Around a stage's run; yields what to call with each row. `result` is asked at the end."""
        self.sum_up()
        begin = time.monotonic()
        if self.bars:
            with self._bar(name) as see:
                yield see
        else:
            self.say(f"{name:<14} starts: {why}")
            yield self._lines(name)
        self.say(f"{name:<14} done in {span(time.monotonic() - begin)}  {headline(result())}".rstrip())

    @contextlib.contextmanager
    def bringing(self, name: str) -> Iterator[Callable[[Row], None]]:
        """Around the downloads before a stage; nothing stays of it."""
        with self._bar(name) if self.bars else contextlib.nullcontext(self._lines(name)) as see:
            yield see

    def _lines(self, name: str) -> Callable[[Row], None]:
        news = News()

        def see(row: Row) -> None:
            if (text := news(row)) is not None:
                self.say(f"{name:<14} {text}")

        return see

    @contextlib.contextmanager
    def _bar(self, name: str) -> Iterator[Callable[[Row], None]]:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(file=self.out, stderr=True)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.fields[words]}"),
        )
        pace, news = Pace(), News()
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(f"{name:<14}", total=None, words="starting")

            def see(row: Row) -> None:
                if (text := news(row)) is not None:
                    progress.console.print(f"{name:<14} {text}", highlight=False)
                if is_progress(row):
                    words = describe(row, pace.see(row))
                    progress.update(bar, total=row["steps"], completed=row["step"], words=words)

            yield see
