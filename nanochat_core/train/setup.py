"""What every training stage builds around the loop: state, validation, and what it leaves behind."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT, write_config
from nanochat_core.optim.groups import Group, parameter_groups
from nanochat_core.optim.optimizer import Optimizer
from nanochat_core.optim.schedule import Rates
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train.checkpoint import TrainState, save_model


def new_state(model: GPT, rates: Rates, world: World, groups: Sequence[Group] | None = None) -> TrainState:
    """A model on its device with a fresh optimizer, at the beginning of its data. `groups` are nanochat's at
    these rates unless given."""
    model = model.to(world.device).train().requires_grad_(True)
    model.compute_dtype = world.dtype
    optimizer = Optimizer(
        groups or parameter_groups(model, rates), rank=world.rank, size=world.size, dtype=world.dtype
    )
    return TrainState(model, optimizer, cursor={})


def leave(job: Job[Any], world: World, state: TrainState, tokenizer: Tokenizer) -> None:
    """Write the finished model and what is needed to read it."""
    if world.is_first:
        write_config(job.path, state.model.config, tokenizer.fingerprint)
        save_model(job.path, state.model)


def records(job: Job[Any]) -> list[dict[str, Any]]:
    """The stage's own metrics, in order; what a resumed stage knows of its beginning."""
    path = job.path / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def recorded(job: Job[Any], key: str) -> list[float]:
    """One column of them."""
    return [row[key] for row in records(job) if key in row]


def learned(job: Job[Any], steps: int) -> Metrics:
    """What a stage's records say: validation at both ends, the last twentieth's loss, the median speed."""
    bpb, losses, speed = (recorded(job, key) for key in ("val_bpb", "loss", "tokens_per_s"))
    tail = losses[-max(1, steps // 20) :]
    return {
        "val_bpb_start": bpb[0],
        "val_bpb": bpb[-1],
        "train_loss": sum(tail) / len(tail),
        "tokens_per_s": statistics.median(speed),
    }
