"""A policy's reward on held-out problems: the same problems with the same seeds each time, so that two
evaluations differ by the model alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat_core.artifacts.stage import Metrics
from nanochat_core.artifacts.store import write_whole
from nanochat_core.data.tasks import Task
from nanochat_core.eval.chat_tasks import pass_at, sizes
from nanochat_core.infer.engine import Engine
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train.rollouts import RolloutSampler, Vitals

MAX_ROWS = 128  # answers at once


class PolicyEvaluation(NamedTuple):
    vitals: Vitals
    metrics: Metrics
    answers: list[dict[str, Any]]  # of all ranks, by problem

    def write(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, "".join(json.dumps(answer) + "\n" for answer in self.answers))


def evaluate_policy(
    model: GPT, tokenizer: Tokenizer, task: Task, sampler: RolloutSampler, problems: int, world: World
) -> PolicyEvaluation:
    """Answer the first `problems` of a task, shared out over the ranks."""
    engine = Engine(model.eval(), tokenizer, max_rows=MAX_ROWS)
    mine = list(range(world.rank, problems, world.size))
    with torch.no_grad():
        answers = sampler.ask(engine, tokenizer, task, mine, "eval")
    vitals = answers.vitals(model, tokenizer, world)
    model.train()
    right = (answers.rewards >= 1).sum(1).tolist()
    ks = sizes(sampler.samples)
    means = answers.rewards.double().mean(1)
    n, total, squares, *passed = world.sum(
        len(mine),
        float(means.sum()),
        float(means.square().sum()),
        *(sum(pass_at(k, sampler.samples, c) for c in right) for k in ks),
    )
    # Of the mean over problems; a problem's samples are not independent of each other.
    standard_error = math.sqrt(max(0.0, squares - total**2 / n) / max(1.0, n - 1) / n)
    said = [tokenizer.decode(completion.ids) for completion in answers.completions]
    lines = [
        {"problem": problem, "rewards": rewards, "said": said[i * sampler.samples :][: sampler.samples]}
        for i, (problem, rewards) in enumerate(zip(mine, answers.rewards.tolist(), strict=True))
    ]
    metrics: Metrics = {
        "eval_reward": vitals.reward,
        "eval_reward_se": standard_error,
        **{f"eval_pass_at_{k}": value / n for k, value in zip(ks, passed, strict=True)},
        **{f"eval_{key}": getattr(vitals, key) for key in ("entropy", "length", "unfinished")},
    }
    everyone = sorted(world.gather(lines), key=lambda line: int(line["problem"]))
    return PolicyEvaluation(vitals, metrics, everyone)


def before_and_after(records: Sequence[dict[str, Any]], kept_step: int) -> Metrics:
    """Reward and pass@k of a stage's records, at its start and at the step that was kept."""
    evaluations = [record for record in records if "eval_reward" in record]
    first, last = evaluations[0], next(record for record in evaluations if record["step"] == kept_step)
    found: Metrics = {}
    for key in first:
        if key.startswith(("eval_reward", "eval_pass_at_")):
            name = key.removeprefix("eval_")
            found |= {f"{name}_start": first[key], name: last[key]}
    return found
