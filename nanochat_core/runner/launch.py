"""Runs one job in a process of its own: `python -m nanochat_core.runner.launch JOB_DIR/job.json`.

The parent starts the child in a session of its own, follows its metrics file and never shares a pipe with it,
so a parent that dies takes nothing along: the child is told by the kernel, saves a checkpoint and ends.
Everything is in the job's directory: job.json (what to do), log.txt (what was said), metrics.jsonl (how far
it is), result.json (that it is done).
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_core.artifacts import orphans, store
from nanochat_core.artifacts.stage import Interrupted, Job, Metrics, Runtime, Stage
from nanochat_core.machine import guard, hardware
from nanochat_core.machine.installed import SAFE_PATH, module
from nanochat_core.machine.proxy import direct
from nanochat_core.runner import inputs, rendezvous, sync
from nanochat_core.runner.exits import DISK_FULL, FULL, killed_rank, last_words, said_since
from nanochat_core.runner.plan import Plan, judge, rerun_path, saved_step
from nanochat_core.runner.provenance import provenance
from nanochat_core.runner.table import load_table

Watch = Callable[[dict[str, Any]], None]
"""Called with every line of a job's metrics file, as it is written."""

INTERRUPTED = 130  # exit codes of the child
INPUT_LOST = 66
STOP_SECONDS = 180.0  # a stage that was told to stop gets this long to end its step and for its checkpoint
POLL_SECONDS = 0.2
LOCKED = "NANOCHAT_LOCKED"  # set in ranks: their launcher holds the locks, and has looked what is done
SETTINGS = {
    # Threads of a CPU kernel sleep while they wait for each other: spinning halves the speed as soon as
    # anything else runs.
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # without it cuBLAS may add in another order each time
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{STOP_SECONDS - 10:.0f}",  # torchrun's patience with its ranks
}


class StageFailed(Exception):
    """A stage's process ended without a result; the message is its own last word."""

    def __init__(self, stage: str, reason: str, log: Path) -> None:
        super().__init__(f"{stage} failed: {reason}")
        self.stage, self.reason, self.log = stage, reason, log


class StageKilled(StageFailed):
    """A stage's process was ended from outside: by the kernel short of memory, or by somebody's kill -9."""


class InputLost(StageFailed):
    """What a stage reads is damaged or gone: that is to be made again first, and then this stage."""


class ShortOfMemory(StageKilled):
    """A stage was ended before memory ran out; what it saved is where to go on with fewer rows at a time."""


# The parent's side.


def pending(plan: Plan, name: str, rerun: str | None = None) -> bool:
    """Whether a row still has work to do: its artefact does not verify, or this request asks for another."""
    return forced(plan, name, rerun) or judge(plan, name, {}).state != "hit"


def forced(plan: Plan, name: str, rerun: str | None) -> bool:
    return rerun is not None and name in plan.rerun and not made_by(plan.jobs[name].path, rerun)


def launch(
    plan: Plan,
    name: str,
    watch: Watch = lambda row: None,
    *,
    rerun: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Metrics:
    """Bring one row of a plan to its result: at once if its artefact verifies, else in a process of its own.

    `rerun` names the request to make a finished artefact again: the same request twice makes it once.
    `stopping` is asked several times a second whether the stage should save and end, as Ctrl-C would make it.
    """
    job = plan.jobs[name]
    if pending(plan, name, rerun) and not forced(plan, name, rerun):
        beginning = {"step": 0, "steps": 1, "time": time.time()}
        lock = lock_path(plan.runtime.base_dir, name, job.fingerprint)
        sync.bring(plan, name, lock, lambda text: watch(beginning | {"note": text}))
    if not pending(plan, name, rerun):
        return result_of(job.path)
    again = rerun_path(job)
    beside = forced(plan, name, rerun) and ((job.path / "result.json").exists() or again.exists())
    work = again if beside else job.path
    work.mkdir(parents=True, exist_ok=True)
    # Only a row that is to be made again bears the request's name: two runs at once share any other's result.
    store.write_json(work / "job.json", describe(plan, name, rerun if name in plan.rerun else None))
    log = work / "log.txt"
    begin = log.stat().st_size if log.exists() else 0
    process = started(work)
    rows = follow(work / "metrics.jsonl")
    short = asked = hangs = False
    heard, length = time.monotonic(), begin
    try:
        while process.poll() is None:
            for row in rows:
                if row is None:
                    break
                heard = time.monotonic()
                watch(row)
            if log.exists() and log.stat().st_size != length:
                heard, length = time.monotonic(), log.stat().st_size
            if 0 < 60 * plan.runtime.silent_minutes < time.monotonic() - heard:
                hangs = True
                break
            if stopping():
                asked = True
                break
            if plan.table[name].device and guard.look():
                short = True
                guard.relieve(process, STOP_SECONDS)
                break
            time.sleep(POLL_SECONDS)
    finally:
        stop(process)
    for row in rows:
        if row is None:
            break
        watch(row)
    if short and process.returncode != 0:
        store.note_attempt(work, "short_of_memory", rows=plan.runtime.device_batch.get(name))
        raise ShortOfMemory(name, "memory was running out, so it was stopped; give it a smaller model, or "
                            f"fewer rows at a time: --set runtime.device_batch.{name}=N", log)  # fmt: skip
    if hangs and process.returncode != 0:
        why = f"it said nothing for {plan.runtime.silent_minutes:g} minutes, so it was ended"
        store.note_attempt(work, "stopped", why=why)
        raise StageKilled(name, f"{why}; run the same command to go on, or give it longer: --set "
                          "runtime.silent_minutes=N", log)  # fmt: skip
    if process.returncode in (INTERRUPTED, -signal.SIGTERM, -signal.SIGINT) or (
        asked and process.returncode != 0  # torchrun ends with a code of its own
    ):
        raise Interrupted(name)
    try:
        result = store.verify(job.path, plan.runtime.base_dir)
    except store.Damaged as damage:  # somebody's doing, right after it was made
        raise StageKilled(name, f"its artefact is damaged: {damage}", log) from None
    if result is None or (process.returncode != 0 and pending(plan, name, rerun)):
        final = log if log.exists() else job.path / "log.txt"
        said = said_since(final, begin) if final.exists() else []
        away = plan.runtime.nnodes > 1 and rendezvous.lost(said)
        killed = process.returncode <= 0 or killed_rank(said) or away
        kind = StageKilled if killed else StageFailed
        if process.returncode == INPUT_LOST or (kind is StageFailed and inputs.lost(plan, name)):
            kind = InputLost
        raise kind(name, last_words(final, begin, process.returncode), final)
    return dict(result["metrics"])


def started(work: Path) -> "subprocess.Popen[bytes]":
    """A process for the job in a directory, which writes to the log there."""
    with (work / "log.txt").open("ab") as out:
        return subprocess.Popen(
            module("nanochat_core.runner.launch", str(work / "job.json")),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment(),
        )


def environment() -> dict[str, str]:
    """A stage's: ours without the orchestrator's settings, for what a model writes may run in it, and these
    hold the password of the API and of its database."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    own = {"PYTHONUNBUFFERED": "1", "NANOCHAT_PARENT": str(os.getpid())}
    return SETTINGS | ours | SAFE_PATH | direct(ours) | own


def kernel_caches(base_dir: Path) -> dict[str, str]:
    """Where compiled kernels are kept: not in /tmp, which is cleaned under a run of days."""
    folder = base_dir / "kernels"
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


def insist(
    plan: Plan,
    name: str,
    watch: Watch = lambda row: None,
    *,
    rerun: str | None = None,
    stopping: Callable[[], bool] = lambda: False,
    tries: int = 3,
) -> Metrics:
    """Launch, and go on from the checkpoint if the process is killed: until that happens `tries` times at one
    step."""
    steps: list[int | None] = []
    while True:
        try:
            return launch(plan, name, watch, rerun=rerun, stopping=stopping)
        except StageKilled as end:
            job = plan.jobs[name]
            steps.append(saved_step(rerun_path(job)) if forced(plan, name, rerun) else saved_step(job.path))
            if steps[-tries:].count(steps[-1]) == tries:
                raise
            if isinstance(end, ShortOfMemory):
                plan = with_fewer_rows(plan, name)
                guard.await_memory(stopping=stopping)


def with_fewer_rows(plan: Plan, name: str) -> Plan:
    """The plan with half a stage's device batch: the mathematics is the same, the memory is not."""
    rows = max(1, plan.runtime.device_batch.get(name, 2 * guard.FEW_ROWS) // 2)
    batches = plan.runtime.device_batch | {name: rows}
    return replace(plan, runtime=plan.runtime.model_copy(update={"device_batch": batches}))


def made_by(directory: Path, rerun: str) -> bool:
    """Whether a finished artefact is what this request to run again has made."""
    try:
        result = store.read_result(directory)
    except store.Damaged:
        return False
    return result is not None and result.get("rerun") == rerun


def result_of(directory: Path) -> Metrics:
    result = store.read_result(directory)
    if result is None:
        raise ValueError(f"{directory} is not finished")
    return dict(result["metrics"])


def follow(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines added to a metrics file from now on; None when there is none yet. A resumed stage may shorten
    the file."""
    position = path.stat().st_size if path.exists() else 0
    while True:
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                position = min(position, size)
                f.seek(position)
                for line in f:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
                        yield json.loads(line)
        except FileNotFoundError:
            position = 0
        yield None


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a child that still runs, with its whole group: first asked, so that it saves; then made to."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def describe(plan: Plan, name: str, rerun: str | None) -> dict[str, Any]:
    """The content of job.json: everything the child needs, and all that explains the artefact later."""
    job = plan.jobs[name]
    reads = {}
    for role, row in plan.sources[name].items():
        try:
            result = store.read_result(job.inputs[role])
        except store.Damaged:
            result = None
        if result is None:
            raise InputLost(
                name,
                f"{name} reads {row}, which is not finished; run it first: "
                f"nanochat stage {row} {plan.profile}",
                job.path / "log.txt",
            )
        reads[role] = {
            "stage": row,
            "fingerprint": plan.jobs[row].fingerprint,
            "content": store.content(result),
        }
    return {
        "format": store.FORMAT,
        "stage": name,
        "version": plan.table[name].version,
        "stages": list(plan.stages),
        "source": plan.table[name].digest,
        "profile": plan.profile,
        "config": job.config.model_dump(mode="json"),
        "fingerprint": job.fingerprint,
        "inputs": reads,
        "rerun": rerun,
        "runtime": plan.runtime.model_dump(mode="json") | {"base_dir": str(plan.runtime.base_dir.resolve())},
        "provenance": provenance(),
    }


# The child's side.


def die_with_parent() -> None:
    """Ask the kernel for a SIGTERM should the parent die; on a system that cannot, the parent's stop() is all
    there is."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        parent = os.environ.get("NANOCHAT_PARENT")
        if parent and os.getppid() != int(parent):  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)


def read_job_file(path: Path) -> tuple[Job[Any], Stage, dict[str, Any]]:
    """A job as its file describes it, and its row of the table that it was planned with."""
    record = json.loads(path.read_text())
    if record["format"] > store.FORMAT:
        raise store.Newer(f"{path} was written by a newer nanochat; update nanochat")
    table = load_table(record["stages"])
    stage = table[record["stage"]]
    if stage.digest != record["source"]:
        raise ValueError(
            f"{stage.file} has changed since {stage.name} was planned; run the same command again"
        )
    runtime = Runtime.model_validate(record["runtime"])
    reads = {
        role: runtime.base_dir / source["stage"] / source["fingerprint"]
        for role, source in record["inputs"].items()
    }
    config = stage.module.Config.model_validate(record["config"])
    rows = {role: table[source["stage"]] for role, source in record["inputs"].items()}
    job = Job(stage.name, config, reads, path.parent, runtime, record["fingerprint"], rows)
    return job, stage, record


def execute(path: Path) -> None:
    """Run a job.json to its result, alone in its directory and, if the stage wants it, on the device."""
    job, stage, record = read_job_file(path)
    with contextlib.ExitStack() as stack:
        if LOCKED not in os.environ and not alone(job, stage, record, stack):
            return
        if int(os.environ.get("RANK", "0")) != 0:
            stage.module.run(job.config, job)
            return
        inputs.insist_on(job, record["inputs"])  # who was told of other inputs must not undo a result
        (job.path / "result.json").unlink(missing_ok=True)
        guard.offer_first()
        store.note_attempt(job.path, "started", pid=os.getpid(), previous_end=last_sign_of_life(job.path))
        stack.enter_context(hardware.logged(job.path / "machine.jsonl"))
        try:
            metrics = stage.module.run(job.config, job)
            # Training stages read all but the shards at their start, and hash each shard as they open it:
            # days are not to be lost over what was not used.
            if stage.ranks == "one":
                inputs.insist_on(job, record["inputs"])
        except Exception as error:
            why = "interrupted" if isinstance(error, Interrupted) else str(error) or type(error).__name__
            with contextlib.suppress(OSError):  # the disk may be what failed
                store.note_attempt(job.path, "stopped", why=why)
            if not isinstance(error, Interrupted | inputs.Lost):
                inputs.insist_on(job, record["inputs"])  # what is damaged there is the better reason
            raise
        attempts = [*store.read_attempts(job.path), {"event": "finished", "time": time.time()}]
        seconds = store.seconds_spent(attempts)
        base_dir = job.runtime.base_dir
        store.commit(
            job.path, base_dir, metrics, job.shared, seconds, record["inputs"], record["rerun"], job.origins
        )
        store.note_attempt(job.path, "finished")
        final = base_dir / job.stage / job.fingerprint
        if job.path != final:
            old = final.with_name(final.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.replace(old)
            job.path.replace(final)
            store.sync_directory(final.parent)
            shutil.rmtree(old, ignore_errors=True)


def alone(job: Job[Any], stage: Stage, record: dict[str, Any], stack: contextlib.ExitStack) -> bool:
    """Hold the locks of a job's directory and of the device, waiting for whoever has them; they survive exec.
    False if there is nothing left to do."""
    locks = job.runtime.base_dir / "locks"
    own = lock_path(job.runtime.base_dir, job.stage, job.fingerprint)
    if not stack.enter_context(store.locked(own, wait=False, keep=True)):
        print(f"another process is at work on {job.stage} {job.fingerprint}; waiting for it", flush=True)
        stack.enter_context(orphans.taken_over(own, STOP_SECONDS))
    orphans.sign(own)
    final = job.runtime.base_dir / job.stage / job.fingerprint
    if job.path != final and not final.exists() and (job.path / "result.json").exists():
        job.path.replace(final)  # a re-run that was complete but not yet put in place
        return False
    if finished_meanwhile(job, record):
        return False
    if stage.device:
        device = locks / "device.lock"
        if not stack.enter_context(store.locked(device, wait=False, keep=True)):
            print("another stage is at work on this device; waiting for it", flush=True)
            stack.enter_context(orphans.taken_over(device, STOP_SECONDS))
        orphans.sign(device)
    return True


def finished_meanwhile(job: Job[Any], record: dict[str, Any]) -> bool:
    """Whether another process has finished this very job while we waited for the lock."""
    try:
        result = store.verify(job.path, job.runtime.base_dir)
    except store.Damaged:
        return False
    return (
        result is not None
        and result["inputs"] == record["inputs"]
        and (record["rerun"] is None or result["rerun"] == record["rerun"])
    )


def lock_path(base_dir: Path, stage: str, fingerprint: str) -> Path:
    """The lock that whoever works on a job holds."""
    return base_dir / "locks" / f"{stage}-{fingerprint}.lock"


def last_sign_of_life(directory: Path) -> float:
    """When an attempt that left no word was last heard of: its metrics or its log."""
    times = [
        path.stat().st_mtime for name in ("metrics.jsonl", "log.txt") if (path := directory / name).exists()
    ]
    return max(times, default=0.0)


def out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: what writes tensors says it in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def become_torchrun(path: Path, runtime: Runtime) -> None:
    """Start the ranks of this machine, once the job's locks are held: ranks that wait for a lock would lose
    each other. Returns only if there is nothing left to do."""
    with contextlib.ExitStack() as stack:
        # of several machines the one that called holds the locks
        if rendezvous.ANSWER not in os.environ and not alone(*read_job_file(path), stack):
            return
        ranks = ["-m", "nanochat_core.runner.launch", str(path)]
        command = module("torch.distributed.run", *rendezvous.torchrun(path.resolve(), runtime), *ranks)
        os.environ[LOCKED] = "1"
        os.environ["NANOCHAT_PARENT"] = str(os.getpid())  # of the ranks, once this process is torchrun
        # the death signal survives exec, so torchrun is told too
        os.execv(command[0], command)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m nanochat_core.runner.launch JOB_DIR/job.json", file=sys.stderr)
        return 2
    die_with_parent()
    path = Path(argv[0])
    try:
        if "RANK" not in os.environ:
            record = json.loads(path.read_text())
            runtime = Runtime.model_validate(record["runtime"])
            os.environ.update(kernel_caches(runtime.base_dir) | os.environ | runtime.environment)
            if load_table(record["stages"])[record["stage"]].ranks == "all" and runtime.processes > 1:
                become_torchrun(path, runtime)
                return 0
        execute(path)
    except Interrupted:
        return INTERRUPTED
    except ValueError as error:
        full = out_of_space(error)  # a library's error that we made a sentence of may come of that
        with contextlib.suppress(OSError):
            print(f"error: {FULL if full else error}", flush=True)
        return DISK_FULL if full else INPUT_LOST if isinstance(error, inputs.Lost) else 1
    except Exception as error:
        full = out_of_space(error)
        with contextlib.suppress(OSError):  # the log is on that disk too, so the exit code says it as well
            traceback.print_exc()
            what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            print(f"error: {FULL if full else what}", flush=True)
        return DISK_FULL if full else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
