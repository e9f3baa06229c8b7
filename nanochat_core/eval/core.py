"""CORE: multiple choice, schema and language-modelling tasks, answered by a base model's likelihoods.

The tasks and their files are DCLM's (https://arxiv.org/abs/2406.11794). An example becomes one or more
candidates: token sequences of which a span is scored. Multiple choice scores what follows the candidates'
common beginning, schema what is their common end, and the lowest mean loss wins; language modelling wants
every token of the continuation to be the model's first choice.
"""

import csv
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

from nanochat_core.artifacts import store
from nanochat_core.eval.spans import BATCH_TOKENS, Candidate, Logits, common_prefix, score
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT

Kind = Literal["multiple_choice", "schema", "language_modeling"]
Example = dict[str, Any]

FIELDS: dict[Kind, dict[str, type]] = {
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class Tokens(Protocol):
    """What is asked of a tokenizer: ours, or transformers' in a coat."""

    @property
    def bos(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class IclTask(NamedTuple):
    """One line of core.yaml, with its chance accuracy from eval_meta_data.csv."""

    label: str
    kind: Kind
    path: Path
    shots: int
    delimiter: str
    baseline: float  # 0..1


class ExampleResult(NamedTuple):
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
    for number, line in enumerate(task.path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line.decode())
            check(task.kind, example)
        except UnicodeDecodeError:
            raise ValueError(f"{task.path}, line {number}: not UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{task.path}, line {number}: not JSON ({error.msg})") from None
        except ValueError as error:
            raise ValueError(f"{task.path}, line {number}: {error}") from None
        examples.append(example)
    if not examples:
        raise ValueError(f"{task.path} is empty: expected one example a line")
    random.Random(1337).shuffle(examples)
    return examples[:limit]


def check(kind: Kind, example: Any) -> None:
    """Refuse an example that is not of its kind."""
    for field, wanted in FIELDS[kind].items():
        if not isinstance(example, dict) or not isinstance(example.get(field), wanted):
            raise ValueError(f"expected {field!r} as {wanted.__name__}")
    options = example.get("choices" if kind == "multiple_choice" else "context_options")
    if kind != "language_modeling":
        if not options or not all(isinstance(option, str) for option in options):
            raise ValueError("expected the options as texts, and at least one")
        if not 0 <= example["gold"] < len(options):
            raise ValueError(f"gold is {example['gold']}, but there are {len(options)} options")


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


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences end with."""
    return common_prefix([sequence[::-1] for sequence in sequences])


def candidates(kind: Kind, tokens: Sequence[list[int]], context: int | None) -> list[Candidate]:
    """The spans to score. At least one token of each is, also where one choice is the beginning of another.

    What is longer than `context` loses its beginning.
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


# -------------------------------------------------------------------------------------------------- a verdict


def evaluate(
    model: GPT | Logits,
    tokenizer: Tokens,
    task: IclTask,
    examples: Sequence[Example],
    *,
    context: int | None,
    device: torch.device | str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    rank: int = 0,
    size: int = 1,
) -> list[ExampleResult]:
    """Answer every example of a task, or every `size`-th from `rank` on."""
    mine = range(rank, len(examples), size)
    texts = [prompts(task, examples[i], shown(task, examples, i)) for i in mine]
    encoded = iter(tokenizer.encode_batch([text for group in texts for text in group]))
    made = [
        candidates(task.kind, [[tokenizer.bos, *next(encoded)] for _ in group], context) for group in texts
    ]
    spans = score(model, made, device=device, batch_tokens=batch_tokens)
    outcomes = []
    for i, found in zip(mine, spans, strict=True):
        losses = [round(span.loss, 6) for span in found]
        if task.kind == "language_modeling":
            outcomes.append(ExampleResult(i, found[0].exact, losses, None))
        else:
            chosen = min(range(len(found)), key=lambda j: found[j].loss)
            outcomes.append(ExampleResult(i, chosen == examples[i]["gold"], losses, chosen))
    return outcomes


def answered(
    model: GPT | Logits,
    tokenizer: Tokens,
    tasks: Sequence[IclTask],
    directory: Path,
    world: World,
    *,
    limit: int | None = None,
    context: int | None,
) -> Iterator[list[ExampleResult]]:
    """The outcomes of each task in turn, as they come; on other ranks than the first they may be missing.

    The examples are shared out over the ranks. A task's answers are written to `directory` once all are
    there, and read from there the next time: a killed evaluation goes on with the task it was at.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        done = directory / f"{task.label}.jsonl"
        if world.any(world.is_first and done.is_file()):
            lines = done.read_text().splitlines() if world.is_first else []
            yield [ExampleResult(**json.loads(line)) for line in lines]
            continue
        share = evaluate(
            model,
            tokenizer,
            task,
            read_examples(task, limit),
            context=context,
            device=world.device,
            rank=world.rank,
            size=world.size,
        )
        outcomes = sorted(world.gather(share))
        if world.is_first:
            store.write_whole(done, "".join(json.dumps(one._asdict()) + "\n" for one in outcomes))
        yield outcomes


def summarize(task: IclTask, outcomes: Sequence[ExampleResult]) -> Score:
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
