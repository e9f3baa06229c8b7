"""A run as a person at a terminal sees it."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from nanochat_core.artifacts.progress import News, Pace, Row, describe, is_progress, span
from nanochat_core.artifacts.stage import Metrics
from nanochat_core.report.headline import headline


class RunDisplay:
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
