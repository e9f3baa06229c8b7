"""What all training stages are told: rates, schedule, batch and validation. Numbers only; nothing here loads
torch."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from nanochat_core.artifacts.planned import Estimate, Planned, Speed
from nanochat_core.artifacts.stage import Later, Recipe
from nanochat_core.data.mixture import Order
from nanochat_core.data.tasks import check_name, sliced
from nanochat_core.data.tasks.needs import check_rows
from nanochat_core.model.flops import flops_per_token
from nanochat_core.model.shape import GPTConfig
from nanochat_core.optim.schedule import Rates, Schedule

REFERENCE_BATCH = 2**19  # tokens; the rates are nanochat's for this batch
CONVERSATION_TOKENS = 500  # the mean of nanochat's mixture: 850 thousand rows, 424M tokens


class Training(Recipe):
    """Rates are nanochat's of July 2026 for a batch of 2^19 tokens; `scale_rates` adapts them to another."""

    seed: int = 42
    matrix_lr: float = Field(0.02, ge=0)
    embedding_lr: float = Field(0.3, ge=0)
    value_embedding_lr: float = Field(0.15, ge=0)
    unembedding_lr: float = Field(0.008, ge=0)
    weight_decay: float = Field(0.28, ge=0)  # of the matrices; falls to 0 by a cosine
    scale_rates: bool = True  # learning rates by sqrt(batch / 2^19)
    lr_fraction: float = Field(
        1.0, ge=0
    )  # of all rates: how far a later stage may move what an earlier one learned
    warmup_steps: int = Field(40, ge=0)
    warmdown: float = Field(0.65, ge=0, le=1)  # the last part of the run, in which rates fall
    final_lr: float = Field(0.05, ge=0, le=1)  # to this fraction
    momentum: tuple[float, float, float] = (0.85, 0.97, 0.90)  # Muon's: at first, warmed up, at the end
    momentum_warmup: int = Field(400, ge=0)
    grad_clip: float | None = Field(None, gt=0)  # upstream found no use for it once Muon was in
    # Leave out the update of a step whose loss or gradient norm lies so many robust standard deviations above
    # the last 128: 6 in OLMo-core. None where a published recipe is to be reproduced.
    skip_spikes: Annotated[float | None, Field(gt=0), Later] = None

    def schedule(self) -> Schedule:
        return Schedule(self.warmup_steps, self.warmdown, self.final_lr, self.momentum, self.momentum_warmup)

    def rates(self, batch_tokens: int, decay_scale: float = 1.0) -> Rates:
        by_batch = math.sqrt(batch_tokens / REFERENCE_BATCH) if self.scale_rates else 1.0
        return Rates(
            self.matrix_lr,
            self.embedding_lr,
            self.value_embedding_lr,
            self.unembedding_lr,
            self.weight_decay * decay_scale,
            by_batch,
            self.lr_fraction,
        )


class ChatTraining(Training):
    """Midtraining and SFT: conversations of a mixture of tasks, packed whole into rows."""

    mixture: dict[str, int]  # task, or a slice of one -> rows of it; more than it has gives them again
    order: Order = "mixed"  # or in_turn: the tasks one after another as they are listed, a curriculum
    loss_on: Literal["assistant", "all"] = "assistant"
    total_batch: int = Field(2**19, ge=1)  # tokens a step
    # Pretraining's decay has fallen to 0 when these stages begin, in nanochat too: it does not come back.
    weight_decay: float = Field(0.0, ge=0)
    steps: int | None = Field(None, ge=1)  # None: about one epoch of the mixture
    eval_every: int = Field(150, ge=0)
    eval_rows: int = Field(1000, ge=1)  # conversations to validate on, none of them trained on

    @field_validator("mixture")
    @classmethod
    def _known(cls, mixture: dict[str, int]) -> dict[str, int]:
        for name in mixture:
            check_name(name)
        return mixture

    def rows(self) -> dict[str, int]:
        """The mixture without what an override has set to 0."""
        return {name: count for name, count in self.mixture.items() if count}

    def held_out(self) -> dict[str, int]:
        """The rows to validate on: the same shares, of whole tasks, for a slice is of the training rows."""
        shares: dict[str, int] = {}
        for name, count in self.rows().items():
            whole = sliced(name)[0]
            share = max(1, count * self.eval_rows // sum(self.mixture.values()))
            shares[whole] = shares.get(whole, 0) + share
        return shares

    def facts(self, stage: Planned) -> dict[str, float]:
        shape = base_shape(stage)
        if self.steps is None:
            return {}
        tokens = self.steps * self.total_batch
        return {"steps": self.steps, "tokens": tokens, "flops": tokens * flops_per_token(shape)}

    def check(self, stage: Planned, ranks: int) -> None:
        divides(self.total_batch, base_shape(stage).sequence_len, f"{stage.name}.total_batch", ranks)
        check_rows(
            f"{stage.name}.mixture", self.rows(), ("train", "validation"), stage.reads["assets"].config
        )

    def estimate(self, stage: Planned, speed: Speed) -> Estimate:
        known = None if self.steps is None else self.steps * self.total_batch
        tokens = known or sum(self.mixture.values()) * CONVERSATION_TOKENS
        steps = tokens / self.total_batch
        looks = 2 + (steps // self.eval_every if self.eval_every else 0)
        work = tokens / speed.train + steps * speed.update
        return Estimate(work + looks * self.eval_rows * CONVERSATION_TOKENS / speed.read, known is None)


def base_shape(stage: Planned) -> GPTConfig:
    """The shape of the model that a stage makes or goes on from: the recipe at the end of `model` has it."""
    while "model" in stage.reads:
        stage = stage.reads["model"]
    shape: GPTConfig = stage.config.shape(stage.reads["tokenizer"].config.vocab_size)
    return shape


def divides(total_batch: int, sequence_len: int, name: str, ranks: int = 1) -> int:
    """Rows of each rank's batch, or an error that says which batch would fit."""
    unit = sequence_len * ranks
    if total_batch % unit:
        nearest = max(1, round(total_batch / unit)) * unit
        raise ValueError(
            f"a total batch of {total_batch:,} tokens is not a multiple of {ranks} x {sequence_len}; "
            f"set {name} to {nearest}"
        )
    return total_batch // unit
