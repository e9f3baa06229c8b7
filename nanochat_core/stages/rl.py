"""Reinforcement learning: the model answers problems that can be checked, and more of what was right becomes
likely."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from nanochat_core.data.tasks import check_name
from nanochat_core.stage import Job, Metrics
from nanochat_core.train.config import Training


class Config(Training):
    # nanochat's GSM8K recipe: 7,473 problems / 16 a step = 467 steps.
    task: str = "gsm8k"
    task_rows: int | None = Field(None, ge=1)  # problems to train on; None: all
    steps: int = Field(467, ge=1)
    questions: int = Field(16, ge=1)  # a step
    samples: int = Field(16, ge=2)  # of each question
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(50, ge=1)
    eval_every: int = Field(60, ge=0)
    eval_problems: int = Field(400, ge=1)  # of the task's test split
    eval_samples: int = Field(4, ge=1)  # of each, at the training temperature
    scale_rates: bool = False  # the batch is not counted in tokens here
    lr_fraction: float = 0.05
    weight_decay: float = 0.0
    warmup_steps: int = 0
    warmdown: float = 1.0
    final_lr: float = 0.0

    @field_validator("task")
    @classmethod
    def _known(cls, task: str) -> str:
        check_name(task)
        return task

    def facts(self, configs: Mapping[str, Any]) -> dict[str, float]:
        return {"steps": self.steps}


def run(cfg: Config, job: Job) -> Metrics:
    """Go on from the fine-tuned model, rewarded by the task's own marking."""
    import torch

    from nanochat_core.data.rollouts import Sampler, rollouts
    from nanochat_core.data.tasks import load_task
    from nanochat_core.infer.engine import Engine
    from nanochat_core.tokenizer.bpe import load_tokenizer
    from nanochat_core.train.checkpoint import TrainState
    from nanochat_core.train.loop import Hook, fit
    from nanochat_core.train.ranks import ranks
    from nanochat_core.train.setup import leave, new_state, recorded, trained_model

    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer)
        assets = job.inputs.get("assets")
        task = load_task(cfg.task, "train", size=cfg.task_rows, assets=assets)
        held_out = load_task(cfg.task, "test", size=cfg.eval_problems, assets=assets)
        if not 0 < world.size <= cfg.questions:
            raise ValueError(f"{world.size} ranks cannot share {cfg.questions} questions; raise rl.questions")
        state = new_state(model, cfg.rates(1), world)
        sampler = Sampler(cfg.samples, cfg.temperature, cfg.top_k, cfg.max_tokens, cfg.seed)
        examiner = Sampler(cfg.eval_samples, cfg.temperature, cfg.top_k, cfg.max_tokens, cfg.seed)

        def examine(state: TrainState) -> Metrics:
            """The same problems with the same seeds each time, so that two examinations differ by the model
            alone."""
            engine = Engine(state.model.eval(), tokenizer, max_rows=128)
            mine = list(range(world.rank, min(cfg.eval_problems, len(held_out)), world.size))
            with torch.no_grad():
                rewards = examiner.ask(engine, tokenizer, held_out, mine, "eval").rewards
            state.model.train()
            mean, best, n = world.sum(float(rewards.mean(1).sum()), float(rewards.amax(1).sum()), len(mine))
            return {"eval_reward": mean / n, "eval_best": best / n}

        fit(
            job,
            world,
            state,
            lambda state: rollouts(
                state.model,
                tokenizer,
                task,
                sampler,
                questions=cfg.questions,
                cursor=state.cursor,
                rank=world.rank,
                size=world.size,
            ),
            steps=cfg.steps,
            schedule=cfg.schedule(),
            grad_clip=cfg.grad_clip,
            hooks=[Hook(cfg.eval_every, examine)],
        )
        leave(job, world, state, tokenizer)
        if not world.is_first:
            return {}
        mean, best = recorded(job, "eval_reward"), recorded(job, "eval_best")
        return {
            "reward_start": mean[0],
            "reward": mean[-1],
            f"pass_at_{cfg.eval_samples}_start": best[0],
            f"pass_at_{cfg.eval_samples}": best[-1],
            "steps": cfg.steps,
            "task": cfg.task,
        }
