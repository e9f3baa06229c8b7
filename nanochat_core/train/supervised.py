"""Training on packed tokens with validation in bits per byte: what pretraining and fine-tuning share."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.data.batch import Batch, ahead
from nanochat_core.eval.bpb import bits_per_byte
from nanochat_core.machine.ranks import World
from nanochat_core.model.flops import flops_per_token
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.config import Training
from nanochat_core.train.loop import Hook, fit
from nanochat_core.train.setup import leave

Packing = Callable[..., Iterator[Batch]]
"""`packed` or `packed_conversations` over their data; called with `rows`, `cursor` and perhaps `epochs`."""

EVAL_ROWS = 32  # of a batch of validation, at most


def train_supervised(
    cfg: Training,
    job: Job[Any],
    world: World,
    state: TrainState,
    tokenizer: Tokenizer,
    *,
    train: Packing,
    validation: Packing,
    rows: int,
    steps: int,
    eval_every: int,
    eval_tokens: int | None = None,
) -> None:
    """Train for `steps` batches of `rows` on each rank and write the model. Validates on `eval_tokens` of all
    ranks, or on everything."""
    shape = state.model.config
    token_bytes = tokenizer.token_bytes()
    eval_rows = max(1, min(rows, EVAL_ROWS))
    per_batch = eval_rows * shape.sequence_len * world.size
    eval_batches = None if eval_tokens is None else max(1, eval_tokens // per_batch)

    def validate(state: TrainState) -> Metrics:
        batches = islice(validation(rows=eval_rows, cursor={}, epochs=1), eval_batches)
        state.model.eval()  # in full precision, also where training multiplies in 8 bits
        value = bits_per_byte(state.model.loss, batches, token_bytes, world)
        state.model.train()
        return {"val_bpb": value}

    fit(
        job,
        world,
        state,
        lambda state: ahead(train(rows=rows, cursor=state.cursor), pin=world.device.type == "cuda"),
        steps=steps,
        schedule=cfg.schedule(),
        grad_clip=cfg.grad_clip,
        skip_spikes=cfg.skip_spikes,
        hooks=[Hook(eval_every, validate)],
        flops_per_token=flops_per_token(shape),
        compile=job.runtime.compile,
    )
    leave(job, world, state, tokenizer)
