"""The model's own answers as batches to learn from: sampled, rewarded, and weighted by how they did among
their likes."""

import functools
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat_core.data.batch import Batch
from nanochat_core.data.tasks import Task
from nanochat_core.infer.engine import Completion, Engine
from nanochat_core.infer.sampling import Sampling
from nanochat_core.model.gpt import GPT
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.chat import render_for_completion


@dataclass(frozen=True)
class Sampler:
    """How answers are drawn: so many of each question, each from its own seed."""

    samples: int
    temperature: float
    top_k: int | None
    max_tokens: int
    seed: int

    def ask(
        self, engine: Engine, tokenizer: Tokenizer, task: Task, questions: Sequence[int], salt: str
    ) -> "Answers":
        """Answer the task's questions; `salt` tells one occasion of asking from another."""
        problems = [task[question] for question in questions]
        prompts = [render_for_completion(tokenizer, problem) for problem in problems]
        settings = [
            Sampling(
                temperature=self.temperature,
                top_k=self.top_k,
                max_tokens=self.max_tokens,
                seed=zlib.crc32(f"{self.seed}-{salt}-{question}-{sample}".encode()),
            )
            for question in questions
            for sample in range(self.samples)
        ]
        repeated = [prompt for prompt in prompts for _ in range(self.samples)]
        completions = engine.complete(repeated, settings)
        rewards = [
            task.reward(problems[i // self.samples], tokenizer.decode(completion.ids))
            for i, completion in enumerate(completions)
        ]
        shape = (len(questions), self.samples)
        return Answers(repeated, completions, torch.tensor(rewards, dtype=torch.float32).view(shape))


@dataclass(frozen=True)
class Answers:
    prompts: list[list[int]]
    completions: list[Completion]
    rewards: torch.Tensor  # (questions, samples)


def rollouts(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    sampler: Sampler,
    *,
    questions: int,
    cursor: dict[str, Any],
    rank: int = 0,
    size: int = 1,
) -> Iterator[Batch]:
    """Batches made by the model as it is when they are asked for (on policy, no reference model, no
    clipping).

    Each step asks so many questions of the task's next ones, shuffled anew each epoch. An answer's advantage
    is its reward minus the mean of its question's; it weighs every token the model itself chose, the end
    included, and the sum is divided by the number of such tokens of all answers. Questions whose answers all
    did alike teach nothing and are left out.
    """
    step: int = cursor.get("step", 0)
    while True:
        model.eval()
        engine = Engine(model, tokenizer, max_rows=min(256, questions * sampler.samples))
        mine = [i for i in range(questions) if i % size == rank]
        asked = [question_at(step * questions + i, len(task), sampler.seed) for i in mine]
        with torch.no_grad():
            answers = sampler.ask(engine, tokenizer, task, asked, f"step-{step}")
        model.train()
        step += 1
        yield to_batch(answers, tokenizer, step)


def question_at(position: int, n: int, seed: int) -> int:
    """Which of n questions comes at a position of an endless sequence that is shuffled anew each time
    round."""
    epoch, index = divmod(position, n)
    return _order(n, seed, epoch)[index]


@functools.lru_cache(2)
def _order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"questions-{seed}-{epoch}").shuffle(order)
    return tuple(order)


def to_batch(answers: Answers, tokenizer: Tokenizer, step: int) -> Batch:
    """The answers that can teach something, padded on the right to the longest."""
    advantages = answers.rewards - answers.rewards.mean(dim=1, keepdim=True)
    end = tokenizer.special("<|assistant_end|>")
    count, rows = 0, []
    for prompt, completion, advantage in zip(
        answers.prompts, answers.completions, advantages.flatten().tolist(), strict=True
    ):
        ids = prompt + completion.ids + ([end] if completion.ended else [])
        mask = [0] * len(prompt) + completion.mask + ([1] if completion.ended else [])
        count += sum(mask)
        if advantage:
            rows.append((ids, mask, advantage))
    rows = rows or [
        (answers.prompts[0] + [end], [0] * (len(answers.prompts[0]) + 1), 0.0)
    ]  # nothing to learn
    T = max(len(ids) for ids, _, _ in rows) - 1
    inputs = torch.full((len(rows), T), tokenizer.bos, dtype=torch.long)
    targets = torch.full((len(rows), T), -1, dtype=torch.long)
    weights = torch.zeros(len(rows), T)
    for r, (ids, mask, advantage) in enumerate(rows):
        n = len(ids) - 1
        row, chosen = torch.tensor(ids), torch.tensor(mask)[1:] > 0
        inputs[r, :n] = row[:-1]
        targets[r, :n] = torch.where(chosen, row[1:], -1)
        weights[r, :n] = chosen * advantage
    alike = int((advantages.abs().sum(dim=1) == 0).sum())
    lengths = [sum(completion.mask) for completion in answers.completions]
    notes = {
        "reward": float(answers.rewards.mean()),
        "answer_tokens": sum(lengths) / len(lengths),
        "alike": alike / advantages.size(0),
    }
    return Batch(inputs, targets, weights, float(max(1, count)), lambda: {"step": step}, notes)
