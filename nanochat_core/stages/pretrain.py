"""Pretraining: a GPT learns the next token of plain text, from nothing."""

import math
from typing import Any, Literal

from pydantic import Field

from nanochat_core.artifacts.planned import Estimate, Planned, Speed
from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.model.flops import flops_per_token, num_params, scaling_params
from nanochat_core.model.shape import GPTConfig
from nanochat_core.train.config import REFERENCE_BATCH, Training, divides

MOST_DECAY = 0.5  # the rule for weight decay was fitted from d8 (0.52) on and runs away below: 1.89 at d4


class Config(Training):
    arch: Literal["seed", "modern"] = "modern"
    depth: int = Field(20, ge=1, le=128)
    aspect: int = Field(64, ge=1)  # width = depth x aspect, in whole heads
    head_dim: int = Field(128, ge=2)
    sequence_len: int = Field(2048, ge=16)
    steps: int | None = Field(None, ge=1)  # the horizon itself, or else
    flops: float | None = Field(None, gt=0)  # so many training FLOPs, or else
    tokens_per_param: float = Field(12.0, gt=0)  # so many tokens per scaling parameter
    total_batch: int | None = Field(None, ge=1)  # tokens a step; None: the rule of `batch`
    eval_every: int = Field(250, ge=0)
    eval_tokens: int = Field(20 * 2**19, ge=1)  # of the validation shard
    prompts: tuple[str, ...] = (  # continued at the end, to be read in the report
        "The capital of France is",
        "If yesterday was Friday, then tomorrow will be",
        "My favorite color is",
        "The planets of the solar system are:",
    )

    def shape(self, vocab_size: int) -> GPTConfig:
        return GPTConfig.of_depth(
            self.depth,
            vocab_size,
            arch=self.arch,
            sequence_len=self.sequence_len,
            aspect=self.aspect,
            head_dim=self.head_dim,
        )

    def relative_horizon(self, vocab_size: int) -> float:
        """Tokens by the ratio, over those of the d12 that the scaling rules were fitted on."""
        d12 = GPTConfig.of_depth(12, vocab_size, arch=self.arch, sequence_len=self.sequence_len)
        return scaling_params(self.shape(vocab_size)) / scaling_params(d12)

    def batch(self, vocab_size: int) -> int:
        """Tokens a step: 2^19 x (D / D of d12)^0.383, to the nearest power of two (https://arxiv.org/abs/2505.13738)."""
        if self.total_batch is not None:
            return self.total_batch
        return int(2 ** round(math.log2(REFERENCE_BATCH * self.relative_horizon(vocab_size) ** 0.383)))

    def horizon(self, vocab_size: int) -> int:
        """Steps of the whole run."""
        if self.steps is not None:
            return self.steps
        shape = self.shape(vocab_size)
        if self.flops is not None:
            tokens = self.flops / flops_per_token(shape)
        else:
            tokens = self.tokens_per_param * scaling_params(shape)
        return max(1, int(tokens // self.batch(vocab_size)))

    def decay_scale(self, vocab_size: int) -> float:
        """Weight decay by batch and horizon (https://arxiv.org/abs/2405.13698), bounded where the rule was
        never tried."""
        if not self.scale_rates or not self.weight_decay:
            return 1.0
        scale = math.sqrt(self.batch(vocab_size) / REFERENCE_BATCH) / self.relative_horizon(vocab_size)
        return min(scale, MOST_DECAY / self.weight_decay)

    def facts(self, stage: Planned) -> dict[str, float]:
        vocab_size = stage.reads["tokenizer"].config.vocab_size
        shape, batch, steps = self.shape(vocab_size), self.batch(vocab_size), self.horizon(vocab_size)
        return {
            "params": sum(num_params(shape).values()),
            "batch": batch,
            "steps": steps,
            "tokens": batch * steps,
            "flops": batch * steps * flops_per_token(shape),
        }

    def check(self, stage: Planned, ranks: int) -> None:
        vocab_size = stage.reads["tokenizer"].config.vocab_size
        batch, shape = self.batch(vocab_size), self.shape(vocab_size)
        divides(batch, shape.sequence_len, f"{stage.name}.total_batch", ranks)

    def estimate(self, stage: Planned, speed: Speed) -> Estimate:
        facts = self.facts(stage)
        looks = 2 + (int(facts["steps"] // self.eval_every) if self.eval_every else 0)
        work = facts["tokens"] / speed.train + facts["steps"] * speed.update
        return Estimate(work + looks * self.eval_tokens / speed.read)


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Train from nothing to the horizon, or from where an earlier attempt got to."""
    from functools import partial

    from nanochat_core.data.packed import packed
    from nanochat_core.infer.engine import Engine
    from nanochat_core.infer.sampling import Sampling
    from nanochat_core.machine.ranks import ranks
    from nanochat_core.model.gpt import GPT
    from nanochat_core.sources.documents import shard_list
    from nanochat_core.tokenizer.bpe import load_tokenizer
    from nanochat_core.train.setup import learned, new_state
    from nanochat_core.train.supervised import train_supervised

    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        vocab = tokenizer.vocab_size
        shape, batch, steps = cfg.shape(vocab), cfg.batch(vocab), cfg.horizon(vocab)
        T = shape.sequence_len
        model = GPT(shape).init_weights(cfg.seed)
        state = new_state(model, cfg.rates(batch, cfg.decay_scale(vocab)), world)
        shards = shard_list(job.inputs["text"])
        packing: dict[str, Any] = {"T": T, "rank": world.rank, "size": world.size}
        train_supervised(
            cfg,
            job,
            world,
            state,
            tokenizer,
            train=partial(packed, shards.train, tokenizer, **packing),
            validation=partial(packed, shards.validation, tokenizer, **packing),
            rows=divides(batch, T, f"{job.stage}.total_batch", world.size),
            steps=steps,
            eval_every=cfg.eval_every,
            eval_tokens=cfg.eval_tokens,
        )
        if not world.is_first:
            return {}
        if cfg.prompts:
            engine = Engine(state.model.eval(), tokenizer, max_rows=len(cfg.prompts), tools=False)
            prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in cfg.prompts]
            answers = engine.complete(prompts, Sampling(max_tokens=min(48, T // 2)))
            lines = [
                f"**{prompt}**{tokenizer.decode(answer.ids)}"
                for prompt, answer in zip(cfg.prompts, answers, strict=True)
            ]
            (job.path / "samples.md").write_text("\n\n".join(lines) + "\n")
        return {
            **learned(job, steps),
            "params": model.num_params(),
            "steps": steps,
            "tokens": steps * batch,
            "flops": steps * batch * flops_per_token(shape),
            "precision": str(world.dtype).removeprefix("torch."),
        }
