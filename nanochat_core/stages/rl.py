"""Reinforcement learning: the model answers problems that can be checked, and more of what was right becomes
likely."""

from pydantic import Field, field_validator

from nanochat_core.artifacts.planned import Estimate, Planned, Speed, answer_tokens
from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.data.tasks import check_name
from nanochat_core.data.tasks.needs import check_rows
from nanochat_core.train.config import Training

QUESTION_TOKENS = 150


class Config(Training):
    # nanochat's GSM8K recipe: 7,473 problems / 16 a step = 467 steps. 373 of them are for the examinations
    # here, so the last 23 steps ask again.
    task: str = "gsm8k"
    task_rows: int | None = Field(None, ge=1)  # problems to train on; None: all
    steps: int = Field(467, ge=1)
    questions: int = Field(16, ge=1)  # a step
    samples: int = Field(16, ge=2)  # of each question
    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = Field(50, ge=1)
    eval_every: int = Field(60, ge=0)
    eval_problems: int = Field(400, ge=1)  # held out from training; the test is for rl_eval alone
    eval_samples: int = Field(8, ge=1)  # of each, at the training temperature: pass@2, 4 and 8
    # The collapse monitor sets the mean of the last `watch` steps beside the examination at step 0. It ends
    # the stage where a limit is passed; the model that did best when examined is kept.
    watch: int = Field(20, ge=1)  # 320 questions: at a reward of .1 three standard errors are .05
    reward_drop: float = Field(0.5, gt=0, le=1)  # what has lost half of its best does not find back
    entropy_low: float = Field(0.05, ge=0)  # of the start's, and no more reward: one answer to all
    entropy_high: float = Field(4.0, gt=1)  # of the start's: the wording falls apart
    length_low: float = Field(0.25, ge=0, lt=1)  # of the start's: answers that say nothing
    unfinished_rise: float = Field(0.5, gt=0, le=1)  # more of the answers than at the start never end
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

    def facts(self, stage: Planned) -> dict[str, float]:
        return {"steps": self.steps}

    def check(self, stage: Planned, ranks: int) -> None:
        if ranks > self.questions:
            raise ValueError(
                f"{ranks} ranks cannot share {self.questions} questions; raise {stage.name}.questions"
            )
        assets = stage.reads["assets"].config
        check_rows(f"{stage.name}.task", (self.task,), ("train", "validation"), assets)

    def estimate(self, stage: Planned, speed: Speed) -> Estimate:
        answers = self.steps * self.questions * self.samples
        looks = 2 + (self.steps // self.eval_every if self.eval_every else 0)
        length = answer_tokens(self.max_tokens)
        written = (answers + looks * self.eval_problems * self.eval_samples) * length
        learned = answers * (QUESTION_TOKENS + length)
        work = written / speed.write + learned / speed.train + self.steps * speed.update
        return Estimate(work, about=True)


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Go on from the fine-tuned model, rewarded by the task's own marking."""
    from collections.abc import Iterator
    from dataclasses import replace

    from nanochat_core.data.batch import Batch
    from nanochat_core.data.tasks import load_task, sliced
    from nanochat_core.infer.exported import trained_model
    from nanochat_core.machine.ranks import ranks
    from nanochat_core.tokenizer.bpe import load_tokenizer
    from nanochat_core.train.checkpoint import TrainState
    from nanochat_core.train.collapse import Collapsed, CollapseLimits, EarlyStopping
    from nanochat_core.train.loop import Hook, fit
    from nanochat_core.train.policy_eval import before_and_after, evaluate_policy
    from nanochat_core.train.rollouts import RolloutSampler, rollouts
    from nanochat_core.train.setup import leave, new_state, records

    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer)
        assets = job.inputs.get("assets")
        task = load_task(cfg.task, "train", size=cfg.task_rows, assets=assets)
        whole = sliced(cfg.task)[0]  # a slice is of the training rows
        held_out = load_task(whole, "validation", size=cfg.eval_problems, assets=assets)
        problems = min(cfg.eval_problems, len(held_out))
        state = new_state(model, cfg.rates(1), world)
        sampler = RolloutSampler(cfg.samples, cfg.temperature, cfg.top_k, cfg.max_tokens, cfg.seed)
        eval_sampler = replace(sampler, samples=cfg.eval_samples)
        limits = CollapseLimits(
            window=cfg.watch,
            questions=cfg.questions,
            problems=problems,
            reward_drop=cfg.reward_drop,
            entropy_low=cfg.entropy_low,
            entropy_high=cfg.entropy_high,
            length_low=cfg.length_low,
            unfinished_rise=cfg.unfinished_rise,
        )
        stopping = EarlyStopping(limits, job.path)

        def evaluate(state: TrainState) -> Metrics:
            found = evaluate_policy(state.model, tokenizer, held_out, eval_sampler, problems, world)
            stopping.evaluated(state.step, found.vitals)
            if world.is_first:
                found.write(job.path / "answers" / f"step_{state.step:06d}.jsonl")
                stopping.best.offer(state.model, state.step, found.vitals.reward)
            return found.metrics

        def batches(state: TrainState) -> Iterator[Batch]:
            cursor = stopping.resume(state)
            made = rollouts(
                state.model, tokenizer, task, sampler, questions=cfg.questions, cursor=cursor, world=world
            )
            return stopping.monitored(made)

        kept_step = cfg.steps
        ended: Metrics = {}
        try:
            fit(
                job,
                world,
                state,
                batches,
                steps=cfg.steps,
                schedule=cfg.schedule(),
                grad_clip=cfg.grad_clip,
                skip_spikes=cfg.skip_spikes,
                hooks=[Hook(cfg.eval_every, evaluate)],
            )
            stopping.check()  # the last evaluation
        except Collapsed as reason:
            if world.is_first:
                kept_step = stopping.best.restore(state.model).step
                sentence = f"stopped at step {state.step} because {reason}; kept step {kept_step}"
                print(sentence, flush=True)
                job.record(step=state.step, steps=cfg.steps, note=sentence)
                ended = {"stopped": sentence, "stopped_at": state.step}
        leave(job, world, state, tokenizer)
        if not world.is_first:
            return {}
        found = before_and_after(records(job), kept_step)
        return {**found, "steps": kept_step, "task": cfg.task, **ended}
