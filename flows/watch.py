"""What Prefect's UI shows of a stage at work: log, progress bar, curve and table; and the ear for Cancel.

The server may be slow or away: all is sent from a thread of its own, and no error there reaches the training.
"""

import contextvars
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import ArtifactSort

from nanochat_core.artifacts.progress import News, Pace, Row, describe, is_progress
from nanochat_core.report import curve_png, read_rows

LOG_SECONDS = 15.0  # between two lines of a stage in the UI's log: 60,000 in ten days, about 40 MB
PROGRESS_SECONDS = 3.0
SLOW_PROGRESS_SECONDS = 60.0  # in a stage of hours: each update leaves 5 kB of event behind
FIRST_CURVE_SECONDS = 60.0
CURVE_SECONDS = 1800.0  # between two curves in the long run
KEEP_CURVES = 48  # of a stage, 40 kB each: a day's; the newest shows all of the training anyway
CANCEL_SECONDS = 5.0
PATIENCE_SECONDS = 10.0  # for the last words at a stage's end


class Watch:
    """Takes a stage's rows and publishes them at a bearable rate while it is entered."""

    def __init__(self, stage: str, directory: Path, also: Callable[[Row], None]) -> None:
        self.stage, self.directory, self.also = stage, directory, also
        self.rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self.log, self.news = get_run_logger(), News()
        self.key = stage.replace("_", "-")
        self.bar: UUID | None = None

    def see(self, row: Mapping[str, Any]) -> None:
        if is_progress(row):
            if (text := self.news(row)) is not None:
                self.log.warning(f"[{self.stage}] {text}")
            self.rows.put(row)
            self.also(row)

    def __enter__(self) -> "Watch":
        context = contextvars.copy_context()  # so that artefacts and lines belong to this task run
        self.thread = threading.Thread(target=lambda: context.run(self._publish), daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rows.put(None)
        self.thread.join(PATIENCE_SECONDS)

    def _publish(self) -> None:
        pace, row, left = Pace(), None, None
        logged, shown, begin = 0.0, 0.0, time.monotonic()
        curve_due, curve_wait = time.monotonic() + FIRST_CURVE_SECONDS, FIRST_CURVE_SECONDS
        while True:
            item = self.rows.get()
            if item is not None:
                row, left = item, pace.see(item)
            now, last = time.monotonic(), item is None
            if row is None or (not last and not self.rows.empty()):
                if last:
                    return
                continue  # only the newest of a burst is worth a word
            if last or now - logged >= LOG_SECONDS:
                self.log.info(f"[{self.stage}] {describe(row, left)}")
                logged = now
            if last or now - shown >= min(max(PROGRESS_SECONDS, (now - begin) / 60), SLOW_PROGRESS_SECONDS):
                self._send(self._progress, row, left)
                shown = now
            if last or now >= curve_due:
                self._send(self._curve)
                curve_wait = min(2 * curve_wait, CURVE_SECONDS)
                curve_due = now + curve_wait
            if last:
                return

    def _send(self, what: Any, *args: Any) -> None:
        """Publish, or let it be: a server that is away hears the next one; training never waits for it."""
        try:
            what(*args)
        except Exception as error:
            self.log.debug(f"[{self.stage}] not published: {error}")

    def _progress(self, row: Row, left: float | None) -> None:
        percent = min(100.0, 100 * row["step"] / row["steps"])
        words = f"{self.stage}: {describe(row, left)}"
        if self.bar is None:
            bar = create_progress_artifact(percent, key=f"{self.key}-progress", description=words)
            assert isinstance(bar, UUID)  # a coroutine only where an event loop runs
            self.bar = bar
        else:
            update_progress_artifact(self.bar, percent, description=words)

    def _curve(self) -> None:
        rows = read_rows(self.directory / "metrics.jsonl")
        if len(rows) < 2:
            return
        picture = curve_png(rows, self.stage)
        lines = [f"![{self.stage}]({picture})", ""] if picture else []
        lines += ["| | |", "|---|---|"]
        lines += [f"| {key} | {value} |" for key, value in rows[-1].items() if key != "time"]
        lines += ["", f"In `{self.directory}`"]
        key = f"{self.key}-curve"
        create_markdown_artifact("\n".join(lines), key=key, description=f"{self.stage} so far")
        prune(key, UUID(str(runtime.flow_run.id)))


def prune(key: str, flow_run: UUID) -> None:
    """Delete a flow run's oldest versions of an artefact: each is a whole picture in the database."""
    with get_client(sync_client=True) as client:
        versions = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run])
            ),
            sort=ArtifactSort.CREATED_DESC,
        )
        for old in versions[KEEP_CURVES:]:
            client.delete_artifact(old.id)


class Cancellation:
    """Watches whether its flow run has been cancelled, should Prefect's own observer have given up."""

    def __init__(self) -> None:
        self.flow_run = runtime.flow_run.id
        self.seen = threading.Event()
        self.over = threading.Event()

    def asked(self) -> bool:
        return self.seen.is_set()

    def __enter__(self) -> "Cancellation":
        context = contextvars.copy_context()
        self.thread = threading.Thread(target=lambda: context.run(self._look), daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()

    def _look(self) -> None:
        if self.flow_run is None:
            return
        while not self.over.wait(CANCEL_SECONDS):
            try:
                with get_client(sync_client=True) as client:
                    state = client.read_flow_run(UUID(str(self.flow_run))).state
            except Exception:  # the server is away: training goes on
                continue
            if state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED):
                self.seen.set()
                return
