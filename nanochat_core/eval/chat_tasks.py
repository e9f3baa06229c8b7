"""How well a chat model answers: by the letter it finds likeliest, or by what it says.

Problems of a task are answered together, and each sample draws from a seed of its own, so that a result
depends neither on the batch nor on the order.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_core.data.tasks.base import Problem, Task
from nanochat_core.eval.spans import BATCH_TOKENS, Candidate, buckets
from nanochat_core.infer.engine import Completion, Engine
from nanochat_core.infer.sampling import Sampling
from nanochat_core.model.gpt import GPT
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.render import render_for_completion

Answered = Callable[[int], None]  # called with the number of problems answered so far


class GradedAnswer(NamedTuple):
    """How one problem went: what is written as a line of the task's jsonl."""

    problem: int
    correct: list[bool]  # of each sample
    said: list[str]


def evaluate_task(
    engine: Engine,
    task: Task,
    *,
    problems: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    top_k: int | None = None,
    max_tokens: int = 256,
    seed: int = 0,
    rank: int = 0,
    size: int = 1,
    progress: Answered | None = None,
) -> list[GradedAnswer]:
    """Answer the first `problems` of a task, or every `size`-th of them from `rank` on."""
    wanted = min(problems if problems is not None else len(task), len(task))
    if not wanted:
        raise ValueError(f"the task {task.name} has no problems to answer")
    mine = range(rank, wanted, size)
    asked = [task[i] for i in mine]
    if task.kind == "categorical":
        letters = choose(engine.model, engine.tokenizer, asked)
        return [
            GradedAnswer(i, [task.correct(problem, letter)], [letter])
            for i, problem, letter in zip(mine, asked, letters, strict=True)
        ]
    answers: list[GradedAnswer] = []
    chunk = max(1, 4 * engine.max_rows // samples)  # enough to keep the rows busy, and progress visible
    for start in range(0, len(asked), chunk):
        part = asked[start : start + chunk]
        sampling = [
            Sampling(temperature, top_k=top_k, max_tokens=max_tokens, seed=sample_seed(seed, i, j))
            for i in mine[start : start + chunk]
            for j in range(samples)
        ]
        prompts = [render_for_completion(engine.tokenizer, problem) for problem in part]
        done = engine.complete([prompt for prompt in prompts for _ in range(samples)], sampling)
        for k, (i, problem) in enumerate(zip(mine[start : start + chunk], part, strict=True)):
            said = [said_by(engine.tokenizer, c) for c in done[k * samples : (k + 1) * samples]]
            answers.append(GradedAnswer(i, [task.correct(problem, words) for words in said], said))
        if progress is not None:
            progress(len(answers))
    return answers


def said_by(tokenizer: Tokenizer, completion: Completion) -> str:
    """A completion as text, with the names of special tokens where the tool was called."""
    return tokenizer.decode(completion.ids)


def sample_seed(seed: int, problem: int, sample: int) -> int:
    """A seed of its own for each sample of each problem."""
    return (seed * 1_000_003 + problem) * 1_009 + sample


@torch.no_grad()
def choose(model: GPT, tokenizer: Tokenizer, asked: Sequence[Problem]) -> list[str]:
    """The likeliest of the allowed letters where the assistant's answer begins, for every problem."""
    device = model.lm_head.weight.device
    context = model.config.positions
    prompts = [render_for_completion(tokenizer, problem)[-context:] for problem in asked]
    candidates = [[Candidate(ids, len(ids) - 1, len(ids))] for ids in prompts]
    chosen: dict[int, str] = {}
    for group in buckets(candidates, BATCH_TOKENS):
        idx = torch.full((len(group), len(prompts[group[0]])), tokenizer.bos)
        for row, i in enumerate(group):
            idx[row, : len(prompts[i])] = torch.tensor(prompts[i])
        last = torch.tensor([len(prompts[i]) - 1 for i in group])
        logits: Tensor = model(idx.to(device), last=last.to(device))[:, 0].cpu()  # (B, V)
        for row, i in enumerate(group):
            letters = asked[i]["letters"]
            ids = [letter_id(tokenizer, letter) for letter in letters]
            chosen[i] = letters[int(logits[row, ids].argmax())]
    return [chosen[i] for i in range(len(asked))]


def letter_id(tokenizer: Tokenizer, letter: str) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"the tokenizer has no single token for the letter {letter!r}")
    return ids[0]


def accuracy(answers: Sequence[GradedAnswer]) -> float:
    """The share of problems that at least one sample got right: pass@k for k samples."""
    return sum(any(answer.correct) for answer in answers) / len(answers)


def passes(answers: Sequence[GradedAnswer], samples: int) -> dict[int, float]:
    """pass@k of a task for each k that so many samples tell; pass@1 is the share of right samples."""
    return {
        k: sum(pass_at(k, samples, sum(answer.correct)) for answer in answers) / len(answers)
        for k in (1, *sizes(samples))
    }


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that k of the samples, drawn without putting back, hold one that is right: the unbiased
    pass@k (https://arxiv.org/abs/2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def sizes(samples: int) -> list[int]:
    """The k above 1 of pass@k that so many samples tell: powers of two, and all of them."""
    powers = {2**i for i in range(1, samples.bit_length())}
    return sorted(powers | {samples}) if samples > 1 else []


def centered(task: Task, value: float) -> float:
    """An accuracy with chance at 0 and perfection at 1."""
    return (value - task.baseline) / (1 - task.baseline)
