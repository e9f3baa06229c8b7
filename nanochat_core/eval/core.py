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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nanochat_core.model.gpt import GPT, SOFTCAP
from nanochat_core.model.kv_cache import KVCache
from nanochat_core.tokenizer.bpe import Tokenizer

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Example = dict[str, Any]

FIELDS: dict[Kind, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
BATCH_TOKENS = 16_384  # of a forward pass, padding included
WORTH_SHARING = 16  # tokens of a common beginning; two passes for fewer take longer than one


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


class Span(NamedTuple):
    """What the model made of a candidate's span."""

    loss: float  # mean, in nats
    exact: bool  # every token was the likeliest


@torch.no_grad()
def score(
    model: nn.Module,
    groups: Sequence[Sequence[Candidate]],
    *,
    device: torch.device | str,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[Span]]:
    """Score the candidates of many examples, in batches of similar length.

    A GPT of ours reads once what the candidates of an example begin with, and only scored positions reach its
    head; any other module that maps (B, T) tokens to logits reads everything.
    """
    found: dict[int, list[Span]] = {}
    for batch in buckets(groups, batch_tokens):
        chosen = [groups[i] for i in batch]
        spans = iter(_ours(model, chosen, device) if isinstance(model, GPT) else _any(model, chosen, device))
        for i in batch:
            found[i] = [next(spans) for _ in groups[i]]
    return [found[i] for i in range(len(groups))]


def buckets(groups: Sequence[Sequence[Candidate]], batch_tokens: int) -> Iterator[list[int]]:
    """Examples of similar length, as many as fit into a pass; longest first: too big shows at once."""

    def longest(i: int) -> int:
        return max(len(candidate.tokens) for candidate in groups[i])

    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(groups)), key=longest, reverse=True):
        if batch and (rows + len(groups[i])) * longest(batch[0]) > batch_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += len(groups[i])
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """(B, T), zeros on the right: harmless, as attention is causal."""
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        idx[row, : len(tokens)] = torch.tensor(tokens)
    return idx.to(device)


def _scored(candidates: Sequence[Candidate], skipped: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) row, position whose logits are wanted (counted from what is skipped of the row), and target."""
    rows = [r for r, c in enumerate(candidates) for _ in range(c.start, c.end)]
    positions = [
        i - 1 - skip for c, skip in zip(candidates, skipped, strict=True) for i in range(c.start, c.end)
    ]
    targets = [token for c in candidates for token in c.tokens[c.start : c.end]]
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(targets)


def _spans(logits: Tensor, rows: Tensor, targets: Tensor, count: int) -> list[Span]:
    """(N, V) logits -> one span for each of `count` rows."""
    targets = targets.to(logits.device)
    nll = nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu()
    missed = (logits.argmax(-1) != targets).double().cpu()
    totals = torch.zeros(3, count, dtype=torch.float64)
    for total, values in zip(totals, (nll, missed, torch.ones_like(nll)), strict=True):
        total.index_add_(0, rows, values)
    return [Span(loss / n, miss == 0) for loss, miss, n in totals.t().tolist()]


def _any(model: nn.Module, groups: Sequence[Sequence[Candidate]], device: torch.device | str) -> list[Span]:
    flat = [candidate for group in groups for candidate in group]
    rows, positions, targets = _scored(flat, [0] * len(flat))
    out = model(_padded([candidate.tokens for candidate in flat], device))
    logits: Tensor = getattr(out, "logits", out)  # transformers wraps them
    return _spans(logits[rows.to(device), positions.to(device)].float(), rows, targets, len(flat))


def _ours(model: GPT, groups: Sequence[Sequence[Candidate]], device: torch.device | str) -> list[Span]:
    flat = [candidate for group in groups for candidate in group]
    shared = [_shared(group) for group in groups]
    if min(shared) >= WORTH_SHARING:
        skipped = [skip for group, skip in zip(groups, shared, strict=True) for _ in group]
        tails = [candidate.tokens[skip:] for candidate, skip in zip(flat, skipped, strict=True)]
        capacity = max(shared) + max(map(len, tails))
        cache = KVCache(model.config, len(flat), capacity, device=device, dtype=model.compute_dtype)
        sizes = torch.tensor([len(group) for group in groups], device=device)
        firsts = sizes.cumsum(0) - sizes
        heads = [group[0].tokens[:skip] for group, skip in zip(groups, shared, strict=True)]
        model.hidden(_padded(heads, device), cache.select(firsts), torch.tensor(shared, device=device))
        source = firsts.repeat_interleave(
            sizes
        )  # every candidate takes over what its example's first has read
        cache.k[..., : cache.high, :] = cache.k[:, source, :, : cache.high]
        cache.v[..., : cache.high, :] = cache.v[:, source, :, : cache.high]
        cache.length.copy_(cache.length[source])
        cache.previous.copy_(cache.previous[source])
        x = model.hidden(_padded(tails, device), cache)
    else:
        skipped = [0] * len(flat)
        x = model.hidden(_padded([candidate.tokens for candidate in flat], device))
    rows, positions, targets = _scored(flat, skipped)
    logits = model.lm_head(x[rows.to(device), positions.to(device)])[..., : model.config.vocab_size].float()
    return _spans(SOFTCAP * torch.tanh(logits / SOFTCAP), rows, targets, len(flat))


def _shared(group: Sequence[Candidate]) -> int:
    """How many tokens of its candidates an example reads only once: their common beginning, without the last
    token before a scored one, whose logits are wanted of each.
    """
    alike = common_prefix([candidate.tokens for candidate in group]) if len(group) > 1 else 0
    return min(alike, *(candidate.start - 1 for candidate in group))


# -------------------------------------------------------------------------------------------------- a verdict


def evaluate(
    model: nn.Module,
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
    spans = score(model, made, device=device, batch_tokens=batch_tokens)
    outcomes = []
    for i, (example, mine) in enumerate(zip(examples, spans, strict=True)):
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
