"""The one training loop: pretraining, midtraining, SFT and RL differ only in the batches they pass in."""

import contextlib
import json
import math
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import psutil
import torch

from nanochat_core.artifacts import store
from nanochat_core.artifacts.stage import Interrupted, Job, Metrics
from nanochat_core.data.batch import Batch
from nanochat_core.machine.hardware import peak_flops
from nanochat_core.machine.ranks import World
from nanochat_core.optim.schedule import Schedule
from nanochat_core.train.checkpoint import Fault, Saver, TrainState
from nanochat_core.train.repeatable import repeatable
from nanochat_core.train.spikes import WINDOW, spikes

Batches = Callable[[TrainState], Iterator[Batch]]
"""Makes the stream of batches that follows a state's cursor; asked again after a fault sent the run back."""

CHECK_SHARE = 0.01  # of the time, for looking whether bits flipped in memory: as many steps as that allows
RECENT_STEPS = 50  # that the time left is reckoned from


class Hook(NamedTuple):
    """Something to do every so many steps, and at the first and last; what it returns is recorded."""

    every: int
    action: Callable[[TrainState], Metrics]

    def due(self, step: int, steps: int) -> bool:
        return step in (0, steps) or (self.every > 0 and step % self.every == 0)


def fit(
    job: Job[Any],
    world: World,
    state: TrainState,
    batches: Batches,
    *,
    steps: int,
    schedule: Schedule,
    grad_clip: float | None = None,
    skip_spikes: float | None = None,
    hooks: Iterable[Hook] = (),
    flops_per_token: float = 0.0,
    compile: bool = False,
) -> None:
    """Train from where the state stands, or its newest checkpoint, to `steps`.

    Weights of a batch are divided by the count of all ranks, so neither the number of ranks nor the device
    batch changes what is computed. A checkpoint is made before hooks run, on the clock, on a step count and
    when the process is told to stop.

    After a Fault the run goes back to the newest checkpoint and repeats what followed, for most are the
    machine's and do not come again. One that does is met by passing over its batch, from one checkpoint
    further back; a third ends the run.
    """
    fp8 = job.runtime.precision == "fp8"
    saver = Saver(
        job.path,
        world,
        job.runtime.keep_checkpoints,
        precision="fp8" if fp8 else str(world.dtype).removeprefix("torch."),
        audits=job.runtime.audit_stretches,
        steps=steps,
    )
    resumed = saver.resume(state)
    if world.is_first:
        rewind_metrics(job.path / "metrics.jsonl", state.step, keep=resumed)
        if resumed:
            print(f"going on from the checkpoint at step {state.step} of {steps}", flush=True)
    runner = _Runner(job, world, state, compile)
    runner.rows = rows_that_fit(job, world, runner.rows)
    attempt = _Attempt(
        job, world, steps, schedule, grad_clip, skip_spikes, tuple(hooks), flops_per_token, saver, runner
    )
    resumed_at = state.step
    place, times = -1, 0  # the furthest batch with a Fault, and how many there were without getting past it
    with stop_signals() as stopping:
        while True:
            try:
                attempt.run(state, batches, stopping)
                return
            except Fault as fault:
                times = times + 1 if fault.batch <= place + 1 else 1
                place = fault.batch if times == 1 else max(place, fault.batch)
                if times == 3:
                    raise ValueError(
                        f"{fault}, for the third time in the same place; "
                        "look at the data there, test the memory, or lower the rates"
                    ) from None
                saver.wait()
                saver.keep = job.runtime.keep_checkpoints + 1  # the newest may be what is wrong
                if times == 1:
                    print(f"{fault}; going back to the last checkpoint", flush=True)
                else:
                    print(f"{fault}, again; passing over batch {fault.batch}", flush=True)
                    state.skip = sorted({*state.skip, fault.batch})
                    saver.discard(resumed_at)
                if not saver.resume(state):  # to go on would repeat data on weights that have seen it
                    raise ValueError(
                        f"{fault}, and no checkpoint is whole to go back to; run it again, from step 0"
                    ) from None
                resumed_at = state.step
                if world.is_first:
                    rewind_metrics(job.path / "metrics.jsonl", state.step, keep=True)


@dataclass(frozen=True)
class _Attempt:
    """The loop, with all that stays the same from one fault to the next."""

    job: Job[Any]
    world: World
    steps: int
    schedule: Schedule
    grad_clip: float | None
    skip_spikes: float | None
    hooks: tuple[Hook, ...]
    flops_per_token: float
    saver: Saver
    runner: "_Runner"

    def run(self, state: TrainState, batches: Batches, stopping: Callable[[], bool]) -> None:
        """Train to the last step; Fault, Interrupted or a hook's own exception ends it before."""
        job, world, steps, saver, runner = self.job, self.world, self.steps, self.saver, self.runner
        stream = batches(state)
        saved = started = time.monotonic()
        checking, sealed = 0.0, True  # seconds; whether this step is checked
        state.optimizer.zero_grad()
        state.optimizer.seals.take()
        peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
        pace: deque[float] = deque(maxlen=RECENT_STEPS)
        place: Callable[[], dict[str, object]] = lambda: state.cursor  # noqa: E731
        try:
            while True:
                if (
                    (job.runtime.save_steps and state.step % job.runtime.save_steps == 0)
                    or state.step in (0, steps, job.runtime.stop_step)
                    or any(hook.due(state.step, steps) for hook in self.hooks)
                    or world.any(time.monotonic() - saved > 60 * job.runtime.save_minutes)
                ):
                    state.cursor = place()
                    saver.save(state)
                    saved = time.monotonic()
                if state.step == job.runtime.stop_step:
                    raise Interrupted
                for hook in self.hooks:
                    if hook.due(state.step, steps):
                        found = hook.action(state)
                        for name, value in found.items():
                            if isinstance(value, float) and not math.isfinite(value):
                                raise Fault(f"{name} is {value} at step {state.step}", state.drawn - 1)
                        if world.is_first and found:
                            known = {name: value for name, value in found.items() if value is not None}
                            job.record(step=state.step, steps=steps, **known)
                if state.step >= steps:
                    saver.inspect(state)
                    return
                if world.any(stopping()):
                    state.cursor = place()
                    saver.save(state)
                    saver.wait()  # say it is saved when it is
                    print(f"told to stop; saved a checkpoint at step {state.step} of {steps}", flush=True)
                    raise Interrupted
                began = time.monotonic()
                batch = next(stream)
                while state.drawn in state.skip:
                    state.drawn += 1
                    batch = next(stream)
                count, tokens = world.sum(batch.count, batch.inputs.numel())
                rows = runner.rows
                mine = runner.backward(batch, count)
                passes = -(-batch.inputs.size(0) // (runner.rows or batch.inputs.size(0)))
                if runner.rows != rows:
                    keep_rows(job, world, runner.rows)
                looked = time.monotonic()
                flips = [f"{name} changed in memory" for name in state.optimizer.seals.broken()]
                if sealed:  # sealed as long as looked at; gradients once more for each pass
                    checking += (2 + passes) * (time.monotonic() - looked)
                loss, norms, flipped = world.sum(mine, state.optimizer.reduce(), len(flips))
                if flipped:
                    saver.refuse(flips, state.step, state.drawn)
                grad_norm = norms / world.size  # all ranks must judge the same number
                if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                    raise Fault(
                        f"batch {state.drawn} at step {state.step} gave a loss of {loss} "
                        f"and a gradient of {grad_norm}",
                        state.drawn,
                    )
                lr = self.schedule.lr(state.step, steps)
                spike = False
                if self.skip_spikes is not None:
                    spike = spikes(state.recent, (loss, grad_norm), self.skip_spikes)
                    state.recent = [*state.recent, (loss, grad_norm)][-WINDOW:]
                # Rollouts may teach nothing: momentum alone would go on at full length, as Muon does.
                if grad_norm > 0 and not spike:
                    state.optimizer.update(
                        lr=lr,
                        momentum=self.schedule.muon_momentum(state.step, steps),
                        weight_decay=self.schedule.weight_decay(state.step, steps),
                        grad_scale=min(1.0, self.grad_clip / (grad_norm + 1e-6)) if self.grad_clip else 1.0,
                    )
                state.optimizer.zero_grad()
                sealed = checking <= CHECK_SHARE * (time.monotonic() - started)
                if sealed:
                    state.optimizer.seals.take()
                state.step += 1
                state.drawn += 1
                place = batch.cursor
                if world.is_first:
                    seconds = time.monotonic() - began
                    pace.append(seconds)
                    rate = self.flops_per_token * tokens / seconds
                    row: dict[str, float] = {"loss": loss, "lr": lr, "grad_norm": round(grad_norm, 6)}
                    row |= {"tokens_per_s": round(tokens / seconds, 1), "tflops": round(rate / 1e12, 5)}
                    if spike:
                        row["skipped"] = 1
                    if peak:
                        row["mfu"] = round(rate / (peak * world.size), 4)
                    # The median: the first step compiles, and one in many waits for a disk.
                    row["eta_s"] = round(statistics.median(pace) * (steps - state.step), 2)
                    row["memory_gb"] = round(memory_gb(world), 2)
                    job.record(step=state.step, steps=steps, **row, **batch.notes)
        except (Fault, Interrupted):
            raise
        except BaseException:
            saver.give_up()
            raise
        finally:
            if isinstance(stream, Generator):
                stream.close()  # ends the thread that reads ahead
            saver.wait()  # the process must not end on half a checkpoint


class _Runner:
    """Forward and backward of a batch in as many pieces as the device has room for."""

    def __init__(self, job: Job[Any], world: World, state: TrainState, compile: bool) -> None:
        self.world = world
        self.runtime, self.compiled = job.runtime, compile
        self.rows = job.runtime.device_batch.get(
            job.stage, 0
        )  # 0: the whole batch, halved while it does not fit
        if job.runtime.precision == "fp8":
            state.model.use_fp8()
        if compile and world.device.type == "cuda":
            state.model.use_block_masks(world.device)
        state.model.turns(world.device)  # by the same arithmetic in every attempt, whatever its hooks ask for
        self.loss = torch.compile(state.model.loss, dynamic=False) if compile else state.model.loss
        self.optimizer = state.optimizer

    def backward(self, batch: Batch, count: float) -> float:
        """Gradients of the batch's loss over `count`; gives this rank's share of the loss."""
        while True:
            # What follows happens after the exception is gone: its traceback holds the failed pass's tensors.
            with (
                contextlib.suppress(torch.cuda.OutOfMemoryError),
                repeatable(self.world.device, self.runtime.deterministic, self.compiled),
            ):
                return self._backward(batch, count)
            rows = self.rows or batch.inputs.size(0)
            if rows == 1:
                raise ValueError(
                    "one row of a batch does not fit in the device's memory; use a smaller model"
                )
            self.rows = -(-rows // 2)
            print(f"out of memory; going on with {self.rows} rows at a time", flush=True)
            self.optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _backward(self, batch: Batch, count: float) -> float:
        device = self.world.device
        rows = self.rows or batch.inputs.size(0)
        losses = []
        for start in range(0, batch.inputs.size(0), rows):
            s = slice(start, start + rows)
            inputs, targets = (
                batch.inputs[s].to(device, non_blocking=True),
                batch.targets[s].to(device, non_blocking=True),
            )
            total, _ = self.loss(inputs, targets, batch.weights[s].to(device, non_blocking=True) / count)
            torch.autograd.backward(total)
            losses.append(total.detach())
        return float(torch.stack(losses).double().sum())


def rows_path(job: Job[Any], world: World) -> Path:
    return job.path / "checkpoints" / f"rows_{world.rank}.json"


def device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def keep_rows(job: Job[Any], world: World, rows: int) -> None:
    """Note how many rows fit, so that an attempt after this one neither runs out of memory nor compiles
    twice."""
    path = rows_path(job, world)
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = job.runtime.device_batch.get(job.stage, 0)
    store.write_json(path, {"device": device_name(world), "asked": asked, "rows": rows})


def rows_that_fit(job: Job[Any], world: World, asked: int) -> int:
    """The rows asked for (0: the whole batch), or the fewer that an earlier attempt found to fit this device.
    Who asks for more than that attempt did is given it."""
    path = rows_path(job, world)
    if not path.exists():
        return asked
    known = json.loads(path.read_text())
    more = known["asked"] != 0 and (asked == 0 or asked > known["asked"])
    if known["device"] != device_name(world) or more:
        return asked
    fitted = int(known["rows"])
    return min(asked or fitted, fitted)


def memory_gb(world: World) -> float:
    """The most that the device has held, or what the process holds where it computes itself."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def rewind_metrics(path: Path, step: int, *, keep: bool) -> None:
    """Drop what was recorded after a checkpoint: it will be recorded again, and the same."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True) if keep else []:
        with contextlib.suppress(ValueError, KeyError):
            row = json.loads(line)
            if row["step"] < step or (row["step"] == step and "loss" in row):
                kept.append(line)
    store.write_whole(path, "".join(kept))


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT has come: asked between steps, so that a step is never cut in half."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped.is_set
        return

    def note(number: int, frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopped.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
