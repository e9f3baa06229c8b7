"""CORE: multiple choice, schema and language-modelling tasks, answered by a base model's likelihoods.

The tasks and their files are DCLM's (https://arxiv.org/abs/2406.11794). An example becomes one or more
candidates: token sequences of which a span is scored. Multiple choice scores what follows the candidates'
common beginning, schema what is their common end, and the lowest mean loss wins; language modelling wants
every token of the continuation to be the model's first choice. Candidates of all examples are batched by
length, and only scored positions reach the head.
"""

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nanochat_core.model.gpt import GPT, SOFTCAP
from nanochat_core.tokenizer.bpe import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Example = dict[str, Any]
LogitsAt = Callable[[Tensor, Tensor, Tensor], Tensor]  # idx (B, T), rows (N,), positions (N,) -> fp32 (N, V)

FIELDS: dict[Kind, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
BATCH_TOKENS = 16_384  # of a forward pass, padding included


class IclTask(NamedTuple):
    """One line of core.yaml, with its chance accuracy from eval_meta_data.csv."""

    label: str
    kind: Kind
    path: Path
    shots: int
    delimiter: str
    baseline: float  # 0..1


class Candidate(NamedTuple):
    """Tokens of which those at start..end-1 are scored."""

    tokens: list[int]
    start: int
    end: int


class Outcome(NamedTuple):
    """How one example went: what is written as a line of the task's jsonl."""

    example: int
    correct: bool
    losses: list[float]  # mean loss of each candidate's span, in nats
    chosen: int | None  # the candidate with the lowest; None for language modelling


class Score(NamedTuple):
    label: str
    accuracy: float
    centered: float
    examples: int


# ------------------------------------------------------------------------------------------------- the bundle


def read_bundle(directory: Path) -> list[IclTask]:
    """The tasks of a bundle in the order of its core.yaml."""
    import yaml

    try:
        listing = yaml.safe_load((directory / "core.yaml").read_text(encoding="utf-8"))["icl_tasks"]
        with (directory / "eval_meta_data.csv").open(encoding="utf-8", newline="") as file:
            chances = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(file)}
        tasks = [
            IclTask(
                entry["label"],
                entry["icl_task_type"],
                directory / "eval_data" / entry["dataset_uri"],
                entry["num_fewshot"][0],
                entry.get("continuation_delimiter", " "),
                chances[entry["label"]],
            )
            for entry in listing
        ]
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: the evaluation bundle is incomplete") from None
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{directory} is not a CORE bundle: {type(error).__name__} {error}") from None
    for task in tasks:
        if task.kind not in FIELDS:
            raise ValueError(f"{directory / 'core.yaml'}: {task.label} has the unknown kind {task.kind!r}")
        if not task.path.is_file():
            raise ValueError(f"{task.path} is missing: the evaluation bundle is incomplete")
    return tasks


def read_examples(task: IclTask, limit: int | None = None) -> list[Example]:
    """A task's examples in the order CORE shuffles them into, or the first `limit` of those."""
    examples = []
    with task.path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{task.path}, line {number}: not JSON ({error.msg})") from None
            for field, kind in FIELDS[task.kind].items():
                if not isinstance(example, dict) or not isinstance(example.get(field), kind):
                    raise ValueError(f"{task.path}, line {number}: expected {field!r} as {kind.__name__}")
            examples.append(example)
    if not examples:
        raise ValueError(f"{task.path} is empty: expected one example a line")
    random.Random(1337).shuffle(examples)
    return examples[:limit]


# ----------------------------------------------------------------------------------------- examples to tokens


def shown(task: IclTask, examples: Sequence[Example], index: int) -> list[Example]:
    """The solved examples put before one: drawn anew for each, never itself, as many as there are."""
    others = range(len(examples) - 1)
    drawn = random.Random(1234 + index).sample(others, min(task.shots, len(others)))
    return [examples[j + (j >= index)] for j in drawn]


def prompts(task: IclTask, example: Example, before: Sequence[Example]) -> list[str]:
    """The texts of an example: one for each choice or context; to be continued, without and with its end."""
    solved = "".join(f"{_solved(task, other)}\n\n" for other in before)
    gap = task.delimiter
    match task.kind:
        case "multiple_choice":
            return [f"{solved}{example['query']}{gap}{choice}" for choice in example["choices"]]
        case "schema":
            return [
                f"{solved}{option}{gap}{example['continuation']}" for option in example["context_options"]
            ]
        case "language_modeling":
            asked = f"{solved}{example['context'].strip()}{gap}"
            return [asked.rstrip(), f"{asked}{example['continuation']}"]


def _solved(task: IclTask, example: Example) -> str:
    match task.kind:
        case "multiple_choice":
            return f"{example['query']}{task.delimiter}{example['choices'][example['gold']]}"
        case "schema":
            option = example["context_options"][example["gold"]]
            return f"{option}{task.delimiter}{example['continuation']}"
        case "language_modeling":
            return f"{example['context'].strip()}{task.delimiter}{example['continuation']}"


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences end with."""
    return common_prefix([sequence[::-1] for sequence in sequences])


def candidates(kind: Kind, tokens: Sequence[list[int]], context: int | None) -> list[Candidate]:
    """The spans to score. At least one token of each is, also where one choice is the beginning of another.

    What is longer than the model's context loses its beginning.
    """
    if kind == "schema":
        length = max(1, min(common_suffix(tokens), min(map(len, tokens)) - 1))
        found = [Candidate(ids, len(ids) - length, len(ids)) for ids in tokens]
    elif kind == "multiple_choice":
        start = max(1, min(common_prefix(tokens), min(map(len, tokens)) - 1))
        found = [Candidate(ids, start, len(ids)) for ids in tokens]
    else:
        without, whole = tokens
        start = max(1, min(common_prefix([without, whole]), len(whole) - 1))
        found = [Candidate(whole, start, len(whole))]
    return [_cut(candidate, context) for candidate in found]


def _cut(candidate: Candidate, context: int | None) -> Candidate:
    cut = len(candidate.tokens) - context if context is not None else 0
    if cut <= 0:
        return candidate
    return Candidate(candidate.tokens[cut:], max(1, candidate.start - cut), candidate.end - cut)


# -------------------------------------------------------------------------------------------------- the model


def logits_at(model: nn.Module) -> LogitsAt:
    """Logits of chosen positions only: over a whole context the head is most of a small model's work."""

    def ours(idx: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        assert isinstance(model, GPT)
        x = model.hidden(idx)[rows, positions]
        logits = model.lm_head(x)[..., : model.config.vocab_size].float()
        capped: Tensor = SOFTCAP * torch.tanh(logits / SOFTCAP)
        return capped

    def any_model(idx: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        out = model(idx)
        logits: Tensor = getattr(out, "logits", out)  # transformers wraps them
        return logits[rows, positions].float()

    return ours if isinstance(model, GPT) else any_model


class Span(NamedTuple):
    """What the model made of a candidate's span."""

    loss: float  # mean, in nats
    exact: bool  # every token was the likeliest


@torch.no_grad()
def score(
    logits: LogitsAt,
    batch: Sequence[Candidate],
    *,
    pad: int,
    device: torch.device | str,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Span]:
    """Score candidates in batches of similar length; padding on the right is harmless to causal attention."""
    found: dict[int, Span] = {}
    for group in buckets(batch, batch_tokens):
        T = len(batch[group[0]].tokens)
        idx = torch.full((len(group), T), pad)
        rows: list[int] = []
        positions: list[int] = []
        for row, i in enumerate(group):
            tokens, start, end = batch[i]
            idx[row, : len(tokens)] = torch.tensor(tokens)
            rows += [row] * (end - start)
            positions += range(start, end)
        where = torch.tensor(rows), torch.tensor(positions)
        targets = idx[where].to(device)
        z = logits(idx.to(device), where[0].to(device), (where[1] - 1).to(device))  # (N, V)
        nll = nn.functional.cross_entropy(z, targets, reduction="none").cpu()
        hit = (z.argmax(-1) == targets).cpu()
        for row, i in enumerate(group):
            mine = where[0] == row
            found[i] = Span(nll[mine].mean().item(), bool(hit[mine].all()))
    return [found[i] for i in range(len(batch))]


def buckets(batch: Sequence[Candidate], batch_tokens: int) -> Iterator[list[int]]:
    """Neighbours by length, as many as fit into a pass; the longest first, so that too big shows at once."""
    order = sorted(range(len(batch)), key=lambda i: -len(batch[i].tokens))
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * len(batch[group[0]].tokens) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


# -------------------------------------------------------------------------------------------------- a verdict


def evaluate(
    logits: LogitsAt,
    tokenizer: Tokenizer,
    task: IclTask,
    examples: Sequence[Example],
    *,
    context: int | None,
    device: torch.device | str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
) -> list[Outcome]:
    """Answer every example of a task."""
    texts = [prompts(task, example, shown(task, examples, i)) for i, example in enumerate(examples)]
    encoded = iter(tokenizer.encode_batch([text for group in texts for text in group]))
    made = [
        candidates(task.kind, [[tokenizer.bos, *next(encoded)] for _ in group], context) for group in texts
    ]
    flat = [candidate for group in made for candidate in group]
    spans = iter(score(logits, flat, pad=tokenizer.bos, device=device, batch_tokens=batch_tokens))
    outcomes = []
    for i, (example, group) in enumerate(zip(examples, made, strict=True)):
        mine = [next(spans) for _ in group]
        losses = [round(span.loss, 6) for span in mine]
        if task.kind == "language_modeling":
            outcomes.append(Outcome(i, mine[0].exact, losses, None))
        else:
            chosen = min(range(len(mine)), key=lambda j: mine[j].loss)
            outcomes.append(Outcome(i, chosen == example["gold"], losses, chosen))
    return outcomes


def summarize(task: IclTask, outcomes: Sequence[Outcome]) -> Score:
    """Accuracy, and the same with chance at 0 and perfection at 1."""
    accuracy = sum(outcome.correct for outcome in outcomes) / len(outcomes)
    return Score(task.label, accuracy, (accuracy - task.baseline) / (1 - task.baseline), len(outcomes))


def core_metric(scores: Sequence[Score]) -> float:
    """CORE: the mean of the centered accuracies."""
    return sum(score.centered for score in scores) / len(scores)


def as_csv(scores: Sequence[Score]) -> str:
    """The file upstream writes: columns padded with spaces, a last row for CORE itself."""
    rows = [f"{'Task':<35}, {'Accuracy':<10}, {'Centered':<10}"]
    rows += [f"{s.label:<35}, {s.accuracy:<10.6f}, {s.centered:<10.6f}" for s in scores]
    rows.append(f"{'CORE':<35}, {'':<10}, {core_metric(scores):<10.6f}")
    return "\n".join(rows) + "\n"
