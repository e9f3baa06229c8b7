"""CORE by hand: a model whose likelihoods are a table, so that every score can be worked out on paper."""

import json
import math
import random
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from nanochat_core.eval import core, spans
from nanochat_core.eval.core import IclTask, Kind
from nanochat_core.eval.spans import Candidate
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer, train

WORLD = World(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["abcdefgh"], 265)  # bytes and the nine specials: one token a letter


class Habits(nn.Module):
    """A model that expects `follows[t]` after token t with probability .9, and anything else alike."""

    def __init__(self, tokenizer: Tokenizer, follows: dict[str, str]) -> None:
        super().__init__()
        self.follows = {tokenizer.encode(a)[0]: tokenizer.encode(b)[0] for a, b in follows.items()}
        self.vocab_size = tokenizer.vocab_size

    def forward(self, idx: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        p = torch.full((*idx.shape, self.vocab_size), 0.1 / (self.vocab_size - 1))
        for token, after in self.follows.items():
            p[idx == token, after] = 0.9
        return p.log()[rows, positions]


class Whole(nn.Module):
    """A model of ours as any other: all of every sequence, nothing shared."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        return self.model(idx)[rows, positions]  # type: ignore[no-any-return]


KINDS: tuple[Kind, ...] = ("multiple_choice", "schema", "language_modeling")


def task(kind: Kind, path: Path = Path(), shots: int = 0, baseline: float = 0.25) -> IclTask:
    return IclTask("made", kind, path, shots, " ", baseline)


def evaluate(model: nn.Module, tokenizer: Tokenizer, kind: Kind, examples: list[Any], **options: Any) -> Any:
    return core.evaluate(
        model,
        tokenizer,
        task(kind, shots=options.pop("shots", 0)),
        examples,
        context=None,
        **options,
    )


def test_multiple_choice_takes_the_lowest_mean_loss_of_what_differs(tokenizer: Tokenizer) -> None:
    # only what follows "x " is scored: b after a and d after c are expected (.9), after a space nothing is
    model = Habits(tokenizer, {"a": "b", "c": "d"})
    example = {"query": "x", "choices": ["cc", "ab", "bd"], "gold": 1}
    (outcome,) = evaluate(model, tokenizer, "multiple_choice", [example])
    flat, expected = math.log(tokenizer.vocab_size), -math.log(0.9)
    rare = -math.log(0.1 / (tokenizer.vocab_size - 1))
    # "cc": c after a space, c after c; "ab": a after a space, b after a; "bd": b after a space, d after b
    by_hand = [(flat + rare) / 2, (flat + expected) / 2, flat]
    assert outcome.losses == pytest.approx(by_hand, abs=1e-4)
    assert (outcome.chosen, outcome.correct) == (1, True)


def test_schema_scores_the_common_end_under_each_beginning(tokenizer: Tokenizer) -> None:
    model = Habits(tokenizer, {"a": " ", " ": "d"})
    example = {"context_options": ["b", "a"], "continuation": "d", "gold": 1}
    (outcome,) = evaluate(model, tokenizer, "schema", [example])
    # the common end is " d"; the space is expected after a only, d after the space always
    expected, flat = -math.log(0.9), math.log(tokenizer.vocab_size)
    assert outcome.losses == pytest.approx([(flat + expected) / 2, expected], abs=1e-4)
    assert (outcome.chosen, outcome.correct) == (1, True)


def test_language_modelling_wants_every_token_to_be_the_first_choice(tokenizer: Tokenizer) -> None:
    model = Habits(tokenizer, {"a": " ", " ": "b", "b": "c"})
    examples = [{"context": "a ", "continuation": c} for c in ("bc", "bd", "b")]
    outcomes = evaluate(model, tokenizer, "language_modeling", examples)
    assert [outcome.correct for outcome in outcomes] == [True, False, True]
    score = core.summarize(task("language_modeling", baseline=0.5), outcomes)
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.centered == pytest.approx(1 / 3)


def test_a_bundle_of_the_three_kinds_comes_to_what_was_worked_out_on_paper(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The model expects b after a and a space after b; after a space it has no opinion. One shot each."""
    habits = Habits(tokenizer, {"a": "b", "b": " ", "c": "d"})
    examples: dict[Kind, list[dict[str, Any]]] = {
        # "ab": flat + likely; "ba": flat + rare; "cd" is as likely as "ab", and the first of equals is taken
        "multiple_choice": [
            {"query": "e", "choices": ["ba", "ab"], "gold": 1},
            {"query": "e", "choices": ["ab", "ba"], "gold": 1},
            {"query": "f", "choices": ["ab", "cd"], "gold": 0},
            {"query": "f", "choices": ["ab", "cd"], "gold": 1},
        ],
        # of the common end " h" the space is likely after b only
        "schema": [
            {"context_options": ["ab", "aa"], "continuation": "h", "gold": 0},
            {"context_options": ["aa", "ab"], "continuation": "h", "gold": 1},
            {"context_options": ["ab", "aa"], "continuation": "h", "gold": 1},
        ],
        # "ga": what follows is "b", likely; "gb" continued by "b" is not
        "language_modeling": [
            {"context": "ga", "continuation": "b"},
            {"context": "gb", "continuation": "b"},
        ],
    }
    (tmp_path / "eval_data").mkdir()
    entries, chances = [], ["Eval Task,Random baseline"]
    for kind, baseline in zip(KINDS, (25, 50, 0), strict=True):
        entries.append(
            {"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [1], "icl_task_type": kind}
            | {"continuation_delimiter": "" if kind == "language_modeling" else " "}
        )
        chances.append(f"{kind},{baseline}")
        lines = "".join(json.dumps(example) + "\n" for example in examples[kind])
        (tmp_path / "eval_data" / f"{kind}.jsonl").write_text(lines)
    (tmp_path / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (tmp_path / "eval_meta_data.csv").write_text("\n".join(chances) + "\n")

    tasks = core.read_bundle(tmp_path)
    found = core.answered(habits, tokenizer, tasks, tmp_path, WORLD, context=None)
    scores = [core.summarize(one, outcomes) for one, outcomes in zip(tasks, found, strict=True)]
    assert [score.accuracy for score in scores] == pytest.approx([1 / 2, 2 / 3, 1 / 2])
    by_hand = [(1 / 2 - 1 / 4) / (3 / 4), (2 / 3 - 1 / 2) / (1 / 2), 1 / 2]
    assert [score.centered for score in scores] == pytest.approx(by_hand)
    assert core.core_metric(scores) == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    lines = (tmp_path / "schema.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["correct"] for line in lines) == [False, True, True]


def test_a_killed_evaluation_goes_on_with_the_task_it_was_at(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tasks = made_bundle(tmp_path / "bundle", 9)
    calls: list[int] = []

    class Cut(Habits):
        def forward(self, *args: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return super().forward(*args)

    straight = list(
        core.answered(Habits(tokenizer, {}), tokenizer, tasks, tmp_path / "x", WORLD, context=None)
    )
    model = Cut(tokenizer, {})
    with pytest.raises(KeyboardInterrupt):
        list(core.answered(model, tokenizer, tasks, tmp_path / "y", WORLD, context=None))
    assert [path.name for path in (tmp_path / "y").iterdir()] == ["multiple_choice.jsonl"]
    assert list(core.answered(model, tokenizer, tasks, tmp_path / "y", WORLD, context=None)) == straight
    assert len(calls) == 4  # one for the first task, one cut short, and two: the first is not asked again


def made_bundle(directory: Path, count: int) -> list[IclTask]:
    """Random examples of each kind as a bundle."""
    (directory / "eval_data").mkdir(parents=True)
    tasks = []
    for kind in KINDS:
        path = directory / "eval_data" / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(example) + "\n" for example in random_examples(kind, count)))
        tasks.append(IclTask(kind, kind, path, 2, " ", 0.25))
    return tasks


def on_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), torch.float32)
    tokenizer = train(["abcdefgh"], 265)
    tasks = made_bundle(Path(folder) / f"bundle-{rank}", 31)
    model = random_model(tokenizer, "modern")
    for _ in range(2):  # the second time everything is there already
        found = list(core.answered(model, tokenizer, tasks, Path(folder), world, context=96))
    assert all(found) == (rank == 0)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_answers_of_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    mp.spawn(on_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    tasks = made_bundle(tmp_path / "again", 31)
    model = random_model(tokenizer, "modern")
    for one, alone in zip(
        tasks, core.answered(model, tokenizer, tasks, tmp_path / "one", WORLD, context=96), strict=True
    ):
        lines = (tmp_path / f"{one.label}.jsonl").read_text().splitlines()
        together = [core.ExampleResult(**json.loads(line)) for line in lines]
        assert [(o.example, o.correct, o.chosen) for o in together] == [
            (o.example, o.correct, o.chosen) for o in alone
        ]
        assert [o.losses for o in together] == [pytest.approx(o.losses, abs=1e-4) for o in alone]


def test_few_shot_examples_are_drawn_as_upstream_draws_them() -> None:
    examples = [{"query": str(i), "choices": ["y"], "gold": 0} for i in range(20)]
    for index in (0, 7, 19):
        others = [i for i in range(20) if i != index]
        drawn = random.Random(1234 + index).sample(others, 5)
        found = core.shown(task("multiple_choice", shots=5), examples, index)
        assert [int(example["query"]) for example in found] == drawn
    assert len(core.shown(task("multiple_choice", shots=10), examples[:4], 0)) == 3  # no more than there are
    assert core.shown(task("multiple_choice", shots=10), examples[:1], 0) == []


def test_prompts_are_cores() -> None:
    mc = {"query": "q", "choices": ["x", "y"], "gold": 1}
    assert core.prompts(task("multiple_choice"), mc, [mc]) == ["q y\n\nq x", "q y\n\nq y"]
    schema = {"context_options": ["c", "d"], "continuation": "e", "gold": 0}
    assert core.prompts(task("schema"), schema, [schema]) == ["c e\n\nc e", "c e\n\nd e"]
    lm = {"context": " c ", "continuation": "e"}
    assert core.prompts(task("language_modeling"), lm, [lm]) == ["c e\n\nc", "c e\n\nc e"]


def test_a_choice_that_begins_another_still_has_a_token_to_score() -> None:
    found = core.candidates("multiple_choice", [[1, 2, 3], [1, 2, 3, 4]], None)
    assert [(c.start, c.end) for c in found] == [(2, 3), (2, 4)]
    found = core.candidates("schema", [[9, 2, 3], [2, 3]], None)
    assert [(c.start, c.end) for c in found] == [(2, 3), (1, 2)]


def test_what_is_too_long_loses_its_beginning() -> None:
    assert core._cut(Candidate([1, 2, 3, 4, 5], 3, 5), 3) == Candidate([3, 4, 5], 1, 3)
    assert core._cut(Candidate([1, 2, 3, 4, 5], 1, 5), 3) == Candidate([3, 4, 5], 1, 3)
    assert core._cut(Candidate([1, 2], 1, 2), 3) == Candidate([1, 2], 1, 2)


def random_examples(kind: Kind, count: int) -> list[dict[str, Any]]:
    rng = random.Random(kind)

    def words(low: int, high: int) -> str:
        return " ".join(
            "".join(rng.choices("abcdefgh", k=rng.randint(1, 5))) for _ in range(rng.randint(low, high))
        )

    match kind:
        case "multiple_choice":
            return [
                {"query": words(1, 12), "choices": [words(1, 4) for _ in range(4)], "gold": rng.randrange(4)}
                for _ in range(count)
            ]
        case "schema":
            return [
                {
                    "context_options": [words(1, 9), words(1, 9)],
                    "continuation": words(1, 4),
                    "gold": rng.randrange(2),
                }
                for _ in range(count)
            ]
        case "language_modeling":
            return [{"context": words(1, 12), "continuation": words(1, 1)} for _ in range(count)]


def random_model(tokenizer: Tokenizer, arch: Literal["seed", "modern"], trained: int = 96) -> GPT:
    shape = GPTConfig(arch, trained, tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = GPT(shape).init_weights(0).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=rng) / weight.size(-1) ** 0.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arch", "count", "trained", "context"),
    [
        ("seed", 167, 96, 96),  # 501 of three kinds, and 120 of each of the others
        ("modern", 40, 96, 96),
        ("seed", 40, 24, 240),  # most are longer than what the model was trained on, and are not cut
        ("modern", 40, 24, 240),
    ],
)
def test_batched_answers_equal_those_one_at_a_time(
    tokenizer: Tokenizer,
    kind: Kind,
    arch: Literal["seed", "modern"],
    count: int,
    trained: int,
    context: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(tokenizer, arch, trained)
    assert context in (trained, model.config.positions)
    examples = random_examples(kind, count)
    options: dict[str, Any] = {"context": context}
    made = task(kind, shots=2)
    together = core.evaluate(model, tokenizer, made, examples, **options)
    any_model = core.evaluate(Whole(model), tokenizer, made, examples, **options)
    monkeypatch.setattr(spans, "WORTH_SHARING", 1_000)
    alone = core.evaluate(model, tokenizer, made, examples, batch_tokens=1, **options)
    for other in (any_model, alone):
        assert [(o.correct, o.chosen) for o in together] == [(o.correct, o.chosen) for o in other]
        assert [o.losses for o in together] == [pytest.approx(o.losses, abs=1e-4) for o in other]


def test_what_candidates_have_in_common_is_read_once(tokenizer: Tokenizer) -> None:
    model = random_model(tokenizer, "seed")
    read: list[int] = []
    model.wte.register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    group = [Candidate([1, *range(2, 42), last, 7], 41, 43) for last in (50, 51, 52, 53)]
    plain = spans.score(Whole(model), [group], device="cpu")
    assert sum(read) == 4 * 43
    read.clear()
    ours = spans.score(model, [group], device="cpu")
    assert sum(read) == 40 + 4 * 3  # 40 of the 41 common tokens, then the last of them and what follows
    assert [span.loss for span in ours[0]] == pytest.approx([span.loss for span in plain[0]], abs=1e-5)


def write_bundle(directory: Path, rows: list[Any], **entry: Any) -> None:
    (directory / "eval_data").mkdir(parents=True, exist_ok=True)
    listed = {
        "label": "t",
        "dataset_uri": "t.jsonl",
        "num_fewshot": [0],
        "icl_task_type": "multiple_choice",
    } | entry
    (directory / "core.yaml").write_text(json.dumps({"icl_tasks": [listed]}))  # JSON is YAML
    (directory / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nt,25\n")
    (directory / "eval_data" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def test_a_bundle_is_read_shuffled_and_limited(tmp_path: Path) -> None:
    rows = [{"query": str(i), "choices": ["a"], "gold": 0} for i in range(10)]
    write_bundle(tmp_path, rows, continuation_delimiter="\n")
    (found,) = core.read_bundle(tmp_path)
    assert (found.baseline, found.delimiter, found.shots) == (0.25, "\n", 0)
    random.Random(1337).shuffle(rows)
    assert core.read_examples(found, 4) == rows[:4]


def test_a_broken_bundle_names_the_file_and_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"core\.yaml is missing"):
        core.read_bundle(tmp_path)
    write_bundle(tmp_path, [{"query": "q", "choices": "a", "gold": 0}])
    (found,) = core.read_bundle(tmp_path)
    with pytest.raises(ValueError, match=r"t\.jsonl, line 1: expected 'choices' as list"):
        core.read_examples(found)
    found.path.write_text(json.dumps({"query": "q", "choices": ["a", "b"], "gold": 2}))
    with pytest.raises(ValueError, match="line 1: gold is 2, but there are 2 options"):
        core.read_examples(found)
    found.path.write_bytes('{"query": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: not UTF-8"):
        core.read_examples(found)
    found.path.write_text("")
    with pytest.raises(ValueError, match=r"t\.jsonl is empty"):
        core.read_examples(found)
    write_bundle(tmp_path, [], label="other")
    with pytest.raises(ValueError, match="not a CORE bundle: KeyError 'other'"):
        core.read_bundle(tmp_path)
    write_bundle(tmp_path, [], icl_task_type="essay")
    with pytest.raises(ValueError, match="unknown kind 'essay'"):
        core.read_bundle(tmp_path)


def test_the_table_ends_in_core() -> None:
    scores = [core.Score("one", 0.5, 1 / 3, 8), core.Score("two", 1.0, 1.0, 8)]
    rows = [[cell.strip() for cell in line.split(",")] for line in core.as_csv(scores).splitlines()]
    assert rows[0] == ["Task", "Accuracy", "Centered"]
    assert rows[-1] == ["CORE", "", "0.666667"]
