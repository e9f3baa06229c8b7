"""Reinforcement learning: the model answers problems that can be checked, and more of what was right becomes
likely."""

from typing import Any

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
    import functools
    import json
    import math
    from collections.abc import Iterator
    from dataclasses import replace

    import torch

    from nanochat_core.artifacts.store import write_whole
    from nanochat_core.data.batch import Batch
    from nanochat_core.data.tasks import load_task, sliced
    from nanochat_core.eval.chat_tasks import pass_at, sizes
    from nanochat_core.infer.engine import Engine
    from nanochat_core.infer.exported import trained_model
    from nanochat_core.machine.ranks import ranks
    from nanochat_core.tokenizer.bpe import load_tokenizer
    from nanochat_core.train.checkpoint import TrainState
    from nanochat_core.train.collapse import Best, Collapsed, CollapseLimits, Monitor
    from nanochat_core.train.loop import Hook, fit
    from nanochat_core.train.rollouts import RolloutSampler, rollouts
    from nanochat_core.train.setup import leave, new_state, records

    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer)
        assets = job.inputs.get("assets")
        task = load_task(cfg.task, "train", size=cfg.task_rows, assets=assets)
        whole = sliced(cfg.task)[0]  # a slice is of the training rows
        held_out = load_task(whole, "validation", size=cfg.eval_problems, assets=assets)
        state = new_state(model, cfg.rates(1), world)
        sampler = RolloutSampler(cfg.samples, cfg.temperature, cfg.top_k, cfg.max_tokens, cfg.seed)
        examiner = RolloutSampler(cfg.eval_samples, cfg.temperature, cfg.top_k, cfg.max_tokens, cfg.seed)
        limits = CollapseLimits(
            window=cfg.watch,
            questions=cfg.questions,
            problems=min(cfg.eval_problems, len(held_out)),
            reward_drop=cfg.reward_drop,
            entropy_low=cfg.entropy_low,
            entropy_high=cfg.entropy_high,
            length_low=cfg.length_low,
            unfinished_rise=cfg.unfinished_rise,
        )
        best = Best(job.path)
        monitor: Monitor | None = None  # made by the examination at step 0, or out of a checkpoint

        def examine(state: TrainState) -> Metrics:
            """The same problems with the same seeds each time, so that two examinations differ by the model
            alone."""
            nonlocal monitor
            engine = Engine(state.model.eval(), tokenizer, max_rows=128)
            mine = list(range(world.rank, min(cfg.eval_problems, len(held_out)), world.size))
            with torch.no_grad():
                answers = examiner.ask(engine, tokenizer, held_out, mine, "eval")
            vitals = answers.vitals(state.model, tokenizer, world.sum)
            state.model.train()
            if monitor is None or state.step == 0:
                monitor = Monitor(limits, vitals)
            else:
                monitor.examined(vitals.reward)
            right = (answers.rewards >= 1).sum(1).tolist()
            ks = sizes(cfg.eval_samples)
            means = answers.rewards.double().mean(1)
            n, total, squares, *passed = world.sum(
                len(mine),
                float(means.sum()),
                float(means.square().sum()),
                *(sum(pass_at(k, cfg.eval_samples, c) for c in right) for k in ks),
            )
            # Of the mean over problems; a problem's samples are not independent of each other.
            spread = math.sqrt(max(0.0, squares - total**2 / n) / max(1.0, n - 1) / n)
            said = [tokenizer.decode(completion.ids) for completion in answers.completions]
            lines = [
                {"problem": i, "rewards": rewards, "said": said[row * cfg.eval_samples :][: cfg.eval_samples]}
                for row, (i, rewards) in enumerate(zip(mine, answers.rewards.tolist(), strict=True))
            ]
            everyone = sorted(world.gather(lines), key=lambda line: int(line["problem"]))
            if world.is_first:
                folder = job.path / "answers"
                folder.mkdir(exist_ok=True)
                text = "".join(json.dumps(line) + "\n" for line in everyone)
                write_whole(folder / f"step_{state.step:06d}.jsonl", text)
                best.offer(state.model, state.step, vitals.reward)
            return {
                "eval_reward": vitals.reward,
                "eval_reward_se": spread,
                **{f"eval_pass_at_{k}": value / n for k, value in zip(ks, passed, strict=True)},
                **{f"eval_{key}": getattr(vitals, key) for key in ("entropy", "length", "unfinished")},
            }

        def watched(state: TrainState) -> Iterator[Batch]:
            """Batches of rollouts, each seen by the monitor first; what it knows is part of the place."""
            nonlocal monitor
            state.cursor = state.cursor.get("ranks", [state.cursor])[0]  # the same place on every rank
            known = state.cursor.get("monitor")
            monitor = None if known is None else Monitor.restored(limits, known)
            return stream(state)

        def stream(state: TrainState) -> Iterator[Batch]:
            made = rollouts(
                state.model,
                tokenizer,
                task,
                sampler,
                questions=cfg.questions,
                cursor=state.cursor,
                rank=world.rank,
                size=world.size,
                total=world.sum,
            )
            for batch, vitals in made:
                assert monitor is not None  # hooks come before the first batch
                if monitor.see(vitals) is not None:
                    raise Collapsed(monitor.why)
                place = functools.partial(dict[str, Any], batch.cursor(), monitor=monitor.state())
                yield replace(batch, cursor=place, notes=batch.notes | vitals._asdict())

        ended: Metrics = {}
        try:
            fit(
                job,
                world,
                state,
                watched,
                steps=cfg.steps,
                schedule=cfg.schedule(),
                grad_clip=cfg.grad_clip,
                hooks=[Hook(cfg.eval_every, examine)],
            )
            if monitor is not None and monitor.why is not None:  # the last examination
                raise Collapsed(monitor.why)
            kept_step = cfg.steps
        except Collapsed as why:
            if world.is_first:
                kept_step = best.restore(state.model).step
                sentence = f"stopped at step {state.step} because {why}; kept step {kept_step}"
                print(sentence, flush=True)
                job.record(step=state.step, steps=cfg.steps, note=sentence)
                ended = {"stopped": sentence, "stopped_at": state.step}
        leave(job, world, state, tokenizer)
        if not world.is_first:
            return {}
        examined = [row for row in records(job) if "eval_reward" in row]
        first, last = examined[0], next(row for row in examined if row["step"] == kept_step)
        found: Metrics = {}
        for key in ("reward", "reward_se"):
            found |= {f"{key}_start": first[f"eval_{key}"], key: last[f"eval_{key}"]}
        for k in sizes(cfg.eval_samples):
            found |= {
                f"pass_at_{k}_start": first[f"eval_pass_at_{k}"],
                f"pass_at_{k}": last[f"eval_pass_at_{k}"],
            }
        return {**found, "steps": kept_step, "task": cfg.task, **ended}
