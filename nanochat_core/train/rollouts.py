"""The model's own answers as batches to learn from: sampled, rewarded, and weighted by how they did among
their likes."""

import functools
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_core.data.batch import Batch
from nanochat_core.data.tasks import Task
from nanochat_core.infer.engine import Completion, Engine
from nanochat_core.infer.sampling import Sampling
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.render import render_for_completion

ROWS = 32  # of a pass that asks for no gradient
NOTHING = 1e-6  # of an advantage: what is left of equal rewards less their mean, which floats do not hit


class Row(NamedTuple):
    """An answer behind its question: mask is 1 where the model itself chose the token."""

    ids: list[int]
    mask: list[int]
    weight: float


class Vitals(NamedTuple):
    """How a policy does: what a collapse shows in."""

    reward: float
    entropy: float  # nats a token, estimated by the surprise at what it drew
    length: float  # tokens of its own in an answer
    unfinished: float  # share of answers that ran out of room


@dataclass(frozen=True)
class RolloutSampler:
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
    rewards: Tensor  # (questions, samples)

    def rows(self, weights: Tensor) -> list[Row]:
        """Each answer with its weight (questions, samples), its end included where the model ended it."""
        ends = [[] if done.terminal is None else [done.terminal] for done in self.completions]
        return [
            Row(
                prompt + completion.ids + end,
                [0] * len(prompt) + completion.mask + [1] * len(end),
                weight,
            )
            for prompt, completion, end, weight in zip(
                self.prompts, self.completions, ends, weights.flatten().tolist(), strict=True
            )
        ]

    def vitals(self, model: GPT, tokenizer: Tokenizer, world: World) -> Vitals:
        """Over the answers of all ranks. The entropy is taken from the first answer to each question, at
        temperature 1 and over the whole vocabulary: one forward pass for few."""
        firsts = self.rows(torch.zeros_like(self.rewards))[:: self.rewards.size(1)]
        device = model.lm_head.weight.device
        nats = chosen = 0.0
        for start in range(0, len(firsts), ROWS):
            inputs, targets, weights = padded(firsts[start : start + ROWS], tokenizer.bos)
            with torch.no_grad():
                _, nll = model.loss(inputs.to(device), targets.to(device), weights.to(device))
            nats += float((nll.cpu() * (targets >= 0)).double().sum())
            chosen += float((targets >= 0).sum())
        n, reward, nats, chosen, tokens, cut = world.sum(
            len(self.completions),
            float(self.rewards.double().sum()),
            nats,
            chosen,
            sum(sum(completion.mask) for completion in self.completions),
            sum(not completion.ended for completion in self.completions),
        )
        return Vitals(reward / n, nats / max(1.0, chosen), tokens / n, cut / n)


def rollouts(
    model: GPT,
    tokenizer: Tokenizer,
    task: Task,
    sampler: RolloutSampler,
    *,
    questions: int,
    cursor: dict[str, Any],
    world: World,
) -> Iterator[tuple[Batch, Vitals]]:
    """Batches made by the model as it is when they are asked for (on policy, no reference model, no
    clipping).

    Each step asks so many questions of the task's next ones, shuffled anew each epoch. An answer's advantage
    is its reward minus the mean of its question's; it weighs every token the model itself chose, the end
    included, and the sum is divided by the number of such tokens of all answers. Questions whose answers all
    did alike teach nothing and are left out. Beside each batch: how the answers of all ranks were.
    """
    step: int = cursor.get("step", 0)
    while True:
        model.eval()
        engine = Engine(model, tokenizer, max_rows=min(256, questions * sampler.samples))
        mine = [i for i in range(questions) if i % world.size == world.rank]
        asked = [question_at(step * questions + i, len(task), sampler.seed) for i in mine]
        with torch.no_grad():
            answers = sampler.ask(engine, tokenizer, task, asked, f"step-{step}")
        vitals = answers.vitals(model, tokenizer, world)
        model.train()
        step += 1
        yield to_batch(answers, tokenizer, step), vitals


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
    rows = answers.rows(advantages)
    count = sum(sum(row.mask) for row in rows)
    telling = [row for row in rows if abs(row.weight) > NOTHING]
    if not telling:  # the loop wants a batch from every rank: one that moves nothing
        telling = [Row([*answers.prompts[0], tokenizer.bos], [0] * (len(answers.prompts[0]) + 1), 0.0)]
    inputs, targets, weights = padded(telling, tokenizer.bos)
    alike = int((advantages.abs().amax(dim=1) <= NOTHING).sum())
    notes = {"alike": alike / advantages.size(0)}
    return Batch(inputs, targets, weights, float(max(1, count)), lambda: {"step": step}, notes)


def padded(rows: Sequence[Row], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """(R, T) inputs, targets and weights, filled up on the right."""
    T = max(len(row.ids) for row in rows) - 1
    inputs = torch.full((len(rows), T), pad, dtype=torch.long)
    targets = torch.full((len(rows), T), -1, dtype=torch.long)
    weights = torch.zeros(len(rows), T)
    for r, row in enumerate(rows):
        n = len(row.ids) - 1
        ids, chosen = torch.tensor(row.ids), torch.tensor(row.mask)[1:] > 0
        inputs[r, :n] = ids[:-1]
        targets[r, :n] = torch.where(chosen, ids[1:], -1)
        weights[r, :n] = chosen * row.weight
    return inputs, targets, weights
