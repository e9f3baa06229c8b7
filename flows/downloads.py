"""Shards are brought by mapped tasks, as many at once as the recipe says; the UI shows which have arrived.

The limit is a pool of threads in the flow's own process: Prefect's limits by tag are leases of the server,
and end with it. The stage that follows finds the files, hashes them and lists them; without Prefect it
brings them itself.
"""

import math
import threading
from collections.abc import Callable
from typing import Any

from prefect import get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from nanochat_core.data.fetch import Fetched, Remote, Stopped, fetch_one, here, offline
from nanochat_core.data.shards import folder_of, remotes
from nanochat_core.plan import Plan, judge
from nanochat_core.progress import count
from nanochat_core.stage import Interrupted
from nanochat_core.stages.shards import Config, urls
from nanochat_core.store import locked

TASKS = 24  # of one stage at most: a task run for each of 800 files would bury the graph
LOOK_SECONDS = 0.5


@task(cache_policy=NO_CACHE, persist_result=False, task_run_name="{label}")
def bring_files(label: str, files: list[Remote], stop: threading.Event) -> dict[str, int]:
    """A few files, one after another; each goes on from the bytes that are here, and is retried by itself."""
    found: list[Fetched] = []
    try:
        for file in files:
            found.append(here(file) or fetch_one(file, wait=stop.wait, stop=stop))
    except Stopped:
        pass  # another task has failed, or the run is cancelled: that one says why
    except BaseException:
        stop.set()
        raise
    got = {"files": len(found), "bytes": sum(file.size for file in found)}
    get_run_logger().info(f"[{label}] {got['files']} files, {count(got['bytes'])}B")
    return got


def bring(plan: Plan, name: str, stopping: Callable[[], bool]) -> list[Any]:
    """Map a shards stage's files over task runs; these, for the stage to be drawn behind them."""
    config = plan.jobs[name].config
    if not isinstance(config, Config) or offline():
        return []
    if judge(plan, name, {}).state == "fetch":
        return []  # the mirror has them
    listed = urls(config)
    if not listed:
        return []
    root = plan.runtime.base_dir / "downloads"
    root.mkdir(parents=True, exist_ok=True)
    files = remotes(listed, root)
    size = math.ceil(len(files) / TASKS)
    batches = [files[i : i + size] for i in range(0, len(files), size)]
    labels = [f"{name} {i * size + 1}-{i * size + len(batch)}" for i, batch in enumerate(batches)]
    stop = threading.Event()
    pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(config.workers)
    with locked(root / f"{folder_of(listed[0])}.lock"), pool as runner:
        try:
            parameters = {"label": labels, "files": batches, "stop": unmapped(stop)}
            futures: list[PrefectFuture[Any]] = list(runner.map(bring_files, parameters))
            while wait(futures, LOOK_SECONDS).not_done:
                if stopping():
                    raise Interrupted(name)
        finally:
            stop.set()
        for future in futures:
            future.result()  # the error of one that failed
        return futures
