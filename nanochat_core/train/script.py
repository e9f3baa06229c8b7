"""Training from a script: the one loop without a recipe, a plan or a stage's directory."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat_core.artifacts.stage import Interrupted, Job, Recipe, Runtime
from nanochat_core.data.batch import ahead
from nanochat_core.data.streams import Stream
from nanochat_core.machine.ranks import ranks
from nanochat_core.model.flops import flops_per_token
from nanochat_core.model.gpt import GPT
from nanochat_core.optim.groups import Group
from nanochat_core.optim.schedule import Rates, Schedule
from nanochat_core.train import loop
from nanochat_core.train.setup import new_state, records

Log = Callable[[dict[str, Any]], object]


def fit(
    model: GPT,
    batches: Stream,
    *,
    steps: int,
    groups: Sequence[Group] | None = None,
    schedule: Schedule | None = None,
    grad_clip: float | None = None,
    hooks: Iterable[loop.Hook] = (),
    log: Log | None = None,
    directory: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    compile: bool = False,
) -> list[dict[str, Any]]:
    """Train `model` in place for `steps` optimizer steps, one batch each, and return what was recorded.

    `batches(cursor)` gives the stream that follows a cursor; text_batches and conversation_batches make one.
    `groups` says which parameters are updated by which rule at which rate; None is nanochat's Muon and AdamW,
    `parameter_groups(model, Rates())`. `schedule` moves the rates; None is `Schedule()`, with a warmup of at
    most a tenth of the steps. Rates are for the unscaled batch: `Rates(scale=(tokens / 2**19) ** 0.5)` is
    nanochat's rule for another number of tokens a step.

    The returned rows are in order: per step `step`, `loss` (mean nats per learned token), `lr` (multiplier),
    `grad_norm`, `tokens_per_s`, `tflops`, `eta_s`, `memory_gb`; and what the hooks returned. `log` is called
    with each row as soon as it is there.

    `directory` keeps checkpoints and metrics.jsonl: a second call with the same arguments resumes, with the
    same weights as if the first had not been interrupted. Without it nothing is kept.

    Raises ValueError if a loss is not finite three times in the same place or if the directory's checkpoint
    does not fit the model, and KeyboardInterrupt on Ctrl-C or SIGTERM, after a last checkpoint. One process
    on one device: for several GPUs run a profile with runtime.nproc.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "fit trains in one process, but torchrun started several; run the script with python, "
            "or train on several GPUs with a profile: nanochat run PROFILE --set runtime.nproc=N"
        )
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    # The script's own number of threads, not all cores: a small model is faster with one.
    runtime = Runtime(device=device, compile=compile, threads=torch.get_num_threads())
    schedule = schedule or Schedule(warmup_steps=min(Schedule.warmup_steps, steps // 10))
    with contextlib.ExitStack() as stack:
        path = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanochat-fit-")))
        path.mkdir(parents=True, exist_ok=True)
        world = stack.enter_context(ranks(runtime))
        job = _ScriptJob("fit", Recipe(), {}, path, runtime, fingerprint="", log=log)
        state = new_state(model, Rates(), world, groups)
        try:
            loop.fit(
                job,
                world,
                state,
                lambda state: ahead(batches(state.cursor), pin=world.device.type == "cuda"),
                steps=steps,
                schedule=schedule,
                grad_clip=grad_clip,
                hooks=hooks,
                flops_per_token=flops_per_token(model.config),
                compile=compile,
            )
        except Interrupted:
            raise KeyboardInterrupt from None
        finally:
            model.eval()
        return records(job)


@dataclass(frozen=True)
class _ScriptJob(Job[Recipe]):
    """A job that also shows its rows to whoever called `fit`."""

    log: Log | None = None

    def record(self, *, step: int, steps: int, **row: float | int | str) -> None:
        super().record(step=step, steps=steps, **row)
        if self.log is not None:
            self.log({"step": step, "steps": steps, **row})
