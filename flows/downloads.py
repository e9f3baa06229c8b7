"""Shards are brought by mapped tasks, as many at once as the recipe says; the UI shows which have arrived.

The limit is a pool of threads in the flow's own process: Prefect's limits by tag are leases of the server,
and end with it. The stage that follows finds the files, hashes them and lists them; without Prefect it
brings them itself.
"""

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from prefect import get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from nanochat_core.artifacts.progress import News, Row, count
from nanochat_core.artifacts.stage import Interrupted
from nanochat_core.artifacts.store import locked
from nanochat_core.runner.plan import Plan, judge
from nanochat_core.sources.download import Fetched, fetch_one, here, offline
from nanochat_core.sources.http import Remote, Stopped
from nanochat_core.sources.shard_sets import folder_of
from nanochat_core.stages.shards import Config
from nanochat_core.stages.shards import files as files_of

TASKS = 24  # of one stage at most: a task run for each of 800 files would bury the graph
LOOK_SECONDS = 0.5


class Arrivals:
    """What the tasks' threads bring and wait for, as rows for whoever watches, and the end of them all."""

    def __init__(self, patience: float, see: Callable[[Row], None], log: Callable[[str], None]) -> None:
        self.patience, self.see, self.log = patience, see, log
        self.stop, self.news, self.guard = threading.Event(), News(), threading.Lock()
        self.files, self.wanted = 0, 1

    def arrived(self) -> None:
        with self.guard:
            self.files += 1
            self._row()

    def waiting(self, text: str) -> None:
        with self.guard:
            self._row(waiting=text)

    def _row(self, **more: str) -> None:
        row: Row = {"step": self.files, "steps": self.wanted, "time": time.time(), **more}
        if (text := self.news(row)) is not None:
            self.log(text)
        self.see(row)


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{label}")
def bring_files(label: str, files: list[Remote], arrivals: Arrivals) -> dict[str, int]:
    """A few files, one after another; each goes on from the bytes that are here, and is retried by itself."""
    found: list[Fetched] = []
    stop, patience = arrivals.stop, arrivals.patience
    try:
        for file in files:
            found.append(
                here(file)
                or fetch_one(file, patience=patience, wait=stop.wait, stop=stop, tell=arrivals.waiting)
            )
            arrivals.arrived()
    except Stopped:
        pass  # another task has failed, or the run is cancelled: that one says why
    except BaseException:
        stop.set()
        raise
    got = {"files": len(found), "bytes": sum(file.size for file in found)}
    get_run_logger().info(f"[{label}] {got['files']} files, {count(got['bytes'])}B")
    return got


def bring(
    plan: Plan, name: str, stopping: Callable[[], bool], see: Callable[[Row], None] = lambda row: None
) -> list[Any]:
    """Map a shards stage's files over task runs; these, for the stage to be drawn behind them."""
    config = plan.jobs[name].config
    if not isinstance(config, Config) or offline():
        return []
    if judge(plan, name, {}).state == "fetch":
        return []  # the mirror has them
    arrivals = Arrivals(
        60 * plan.runtime.network_minutes, see, lambda text: get_run_logger().warning(f"[{name}] {text}")
    )

    def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if stopping():
                raise Interrupted(name)
            time.sleep(min(LOOK_SECONDS, left))

    root = plan.runtime.base_dir / "downloads"
    root.mkdir(parents=True, exist_ok=True)
    files = files_of(config, root, arrivals.patience, pause, arrivals.waiting)
    if not files:
        return []
    arrivals.wanted = len(files)
    size = math.ceil(len(files) / TASKS)
    batches = [files[i : i + size] for i in range(0, len(files), size)]
    labels = [f"{name} {i * size + 1}-{i * size + len(batch)}" for i, batch in enumerate(batches)]
    pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(config.workers)
    with locked(root / f"{folder_of(files[0].url)}.lock"), pool as runner:
        try:
            parameters = {"label": labels, "files": batches, "arrivals": unmapped(arrivals)}
            futures: list[PrefectFuture[Any]] = list(runner.map(bring_files, parameters))
            while wait(futures, LOOK_SECONDS).not_done:
                if stopping():
                    raise Interrupted(name)
        finally:
            arrivals.stop.set()
        for future in futures:
            future.result()  # the error of one that failed
        return futures
