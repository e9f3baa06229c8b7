"""Chat evaluation with a real engine and a tiny model, and the stages that use it, end to end."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanochat_core.artifacts.stage import Job, Runtime
from nanochat_core.data import tasks
from nanochat_core.data.tasks import load_task
from nanochat_core.data.tasks.base import Rows, dialogue, final_number
from nanochat_core.eval import chat_tasks, core
from nanochat_core.infer.engine import Completion, Engine
from nanochat_core.infer.sampling import Sampling
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT, load_model, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.stages import assets, base_eval, chat_eval
from nanochat_core.tokenizer.bpe import Tokenizer, load_tokenizer, train
from nanochat_core.tokenizer.render import render_for_completion
from nanochat_core.train.checkpoint import save_model


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["what is the capital of this country and how many apples are in the box"], 290)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT:
    shape = GPTConfig(
        "seed", sequence_len=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32
    )
    model = GPT(shape).init_weights(0).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=rng) / weight.size(1) ** 0.5)
    return model


class Scripted:
    """An engine that says what it is told to, sample after sample."""

    max_rows = 2

    def __init__(self, tokenizer: Tokenizer, model: GPT, script: list[str]) -> None:
        self.tokenizer, self.model, self.script = tokenizer, model, script
        self.seeds: list[int] = []

    def complete(self, prompts: list[list[int]], sampling: list[Sampling]) -> list[Completion]:
        self.seeds += [s.seed for s in sampling]
        said = [self.tokenizer.encode(self.script.pop(0)) for _ in prompts]
        return [Completion(ids, [1] * len(ids), 0) for ids in said]


def test_one_right_sample_is_enough_and_every_sample_has_its_own_seed(
    tokenizer: Tokenizer, model: GPT
) -> None:
    task = load_task("spelling", "test", size=5)
    right = ["".join(str(task[i]["messages"][1]["content"])) for i in range(5)]
    script = [right[0], "no", "no", right[1], "no", "no", "no", "no", right[4], right[4]]
    engine: Any = Scripted(tokenizer, model, script)
    seen: list[int] = []
    answers = chat_tasks.evaluate_task(engine, task, samples=2, temperature=1.0, progress=seen.append)
    assert [answer.correct for answer in answers] == [
        [True, False],
        [False, True],
        [False, False],
        [False, False],
        [True, True],
    ]
    assert chat_tasks.accuracy(answers) == pytest.approx(0.6)
    assert chat_tasks.passes(answers, 2) == {1: pytest.approx(0.4), 2: pytest.approx(0.6)}
    assert len(set(engine.seeds)) == 10
    assert seen == [4, 5]


def test_letters_are_compared_at_the_start_of_the_answer_alike_in_a_batch_and_alone(
    tokenizer: Tokenizer, model: GPT
) -> None:
    task = load_task("choices", "test", size=20)
    problems = [task[i] for i in range(20)]
    together = chat_tasks.choose(model, tokenizer, problems)
    for problem, letter in zip(problems, together, strict=True):
        prompt = torch.tensor([render_for_completion(tokenizer, problem)[-128:]])
        logits = model(prompt)[0, -1]
        assert letter == max("ABCD", key=lambda name: logits[tokenizer.encode(name)[0]].item())
    assert chat_tasks.centered(task, 0.25) == 0 and chat_tasks.centered(task, 1.0) == 1


def test_real_answers_do_not_depend_on_the_batch(tokenizer: Tokenizer, model: GPT) -> None:
    task = load_task("word_problems", "test", size=6)
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "samples": 2}
    wide = chat_tasks.evaluate_task(Engine(model, tokenizer, max_rows=12), task, **options)
    narrow = chat_tasks.evaluate_task(Engine(model, tokenizer, max_rows=1), task, **options)
    assert wide == narrow


def on_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank, 2, torch.device("cpu"), torch.float32)
    engine = Engine(load_model(Path(folder)), load_tokenizer(Path(folder)), max_rows=4)
    for name in ("word_problems", "choices"):
        share = chat_tasks.evaluate_task(engine, load_task(name, "test", size=5), rank=rank, size=2, **ASKED)
        assert len(share) == 3 - rank
        found = [answer._asdict() for answer in sorted(world.gather(share))]
        (Path(folder) / f"{name}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


ASKED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12, "samples": 2}


@pytest.mark.slow
def test_two_ranks_give_the_answers_of_one(tokenizer: Tokenizer, model: GPT, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    write_config(tmp_path, model.config, tokenizer.fingerprint)
    save_model(tmp_path, model)
    mp.spawn(on_one_of_two, args=(str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    for name in ("word_problems", "choices"):
        alone = chat_tasks.evaluate_task(Engine(model, tokenizer), load_task(name, "test", size=5), **ASKED)
        for rank in (0, 1):
            found = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            assert [chat_tasks.GradedAnswer(**answer) for answer in found] == alone


def test_the_evaluation_stages_run_and_go_on_after_a_kill(
    tokenizer: Tokenizer, model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(stage: str, cfg: Any, **inputs: Path) -> Job:
        path = tmp_path / stage / "f"
        path.mkdir(parents=True, exist_ok=True)
        return Job(
            stage,
            cfg,
            inputs,
            path,
            Runtime(base_dir=tmp_path, device="cpu", precision="fp32", threads=1),
            "f",
        )

    made = job("assets", assets.Config())
    counted = assets.run(assets.Config(), made)
    assert counted["core_tasks"] == 7 and counted["words"] == 321
    at = tmp_path / "model"
    at.mkdir()
    tokenizer.save(at)
    write_config(at, model.config, tokenizer.fingerprint)
    save_model(at, model)

    cfg = base_eval.Config(max_per_task=6)
    evaluation = job("base_eval", cfg, model=at, tokenizer=at, assets=made.path)
    metrics = base_eval.run(cfg, evaluation)
    scores = [v for k, v in metrics.items() if k != "core" and not k.endswith("_accuracy")]
    assert len(scores) == 7
    assert metrics["core"] == pytest.approx(sum(map(float, scores)) / 7)  # type: ignore[arg-type]
    assert (evaluation.path / "core.csv").read_text().splitlines()[-1].startswith("CORE")
    lines = (evaluation.path / "answers" / "factbook_capitals.jsonl").read_text().splitlines()
    assert len(lines) == 6 and len(json.loads(lines[0])["losses"]) == 4
    (
        evaluation.path / "partial" / "factbook_recall.jsonl"
    ).unlink()  # as if it had been killed in the last task
    evaluated: list[str] = []
    real = core.evaluate

    def watched(*args: Any, **options: Any) -> Any:
        evaluated.append(args[2].label)
        return real(*args, **options)

    monkeypatch.setattr(core, "evaluate", watched)
    assert base_eval.run(cfg, evaluation) == metrics
    assert evaluated == ["factbook_recall"]

    ask = chat_eval.Config(tasks=("capitals", "choices", "word_problems_hard"), problems=4, max_tokens=8)
    asked = job("sft_eval", ask, model=at, tokenizer=at, assets=made.path)
    metrics = chat_eval.run(ask, asked)
    assert list(metrics) == ["chatcore", "capitals", "choices", "word_problems_hard"]
    assert len((asked.path / "answers" / "choices.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(chat_tasks, "evaluate_task", None)  # nothing is asked twice
    assert chat_eval.run(ask, asked) == metrics


def test_pass_at_k_is_the_chance_that_k_of_the_samples_hold_a_right_one() -> None:
    for samples, right in ((1, 0), (4, 1), (6, 3), (5, 5)):
        marks = [i < right for i in range(samples)]
        for k in range(1, samples + 1):
            drawn = [any(draw) for draw in itertools.combinations(marks, k)]
            assert chat_tasks.pass_at(k, samples, right) == pytest.approx(sum(drawn) / len(drawn))
    assert (chat_tasks.sizes(1), chat_tasks.sizes(2), chat_tasks.sizes(6), chat_tasks.sizes(8)) == (
        [],
        [2],
        [2, 4, 6],
        [2, 4, 8],
    )


def test_chatcore_over_six_tasks_gives_that_over_five_beside_it(
    tokenizer: Tokenizer, model: GPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = tmp_path / "model"
    at.mkdir()
    tokenizer.save(at)
    write_config(at, model.config, tokenizer.fingerprint)
    save_model(at, model)
    right = {"arc_easy": 0.75, "arc_challenge": 0.5, "mmlu": 0.25, "gsm8k": 0.5, "humaneval": 0.25}
    right |= {"spellingbee": 1.0, "capitals": 0.5}

    def made(name: str, split: str, **options: Any) -> Rows:
        choice = name in ("arc_easy", "arc_challenge", "mmlu")
        kind: Any = "categorical" if choice else "generative"
        return Rows(name, 4, lambda i: dialogue("?", "!"), kind=kind, baseline=0.25 * choice)

    def answered(engine: Any, task: Rows, **options: Any) -> list[chat_tasks.GradedAnswer]:
        return [chat_tasks.GradedAnswer(i, [i < 4 * right[task.name]], ["!"]) for i in range(4)]

    monkeypatch.setattr(tasks, "load_task", made)
    monkeypatch.setattr(chat_tasks, "evaluate_task", answered)

    def metrics(*names: str) -> dict[str, Any]:
        cfg = chat_eval.Config(tasks=names) if names else chat_eval.Config()
        path = tmp_path / f"evaluation-{len(names)}"
        path.mkdir()
        runtime = Runtime(base_dir=tmp_path, device="cpu", precision="fp32", threads=1)
        return chat_eval.run(cfg, Job("sft_eval", cfg, {"model": at, "tokenizer": at}, path, runtime, "f"))

    # by hand, chance at 0: 2/3, 1/3, 0 of the choices, .5 and .25 of the others, and spellingbee 1
    five = (2 / 3 + 1 / 3 + 0 + 0.5 + 0.25) / 5
    six = metrics()
    assert six["chatcore"] == pytest.approx((5 * five + 1) / 6) and six["chatcore_5"] == pytest.approx(five)
    alone = metrics(*chat_eval.FIVE)
    assert alone["chatcore"] == pytest.approx(five) and "chatcore_5" not in alone
    assert "chatcore_5" not in metrics("arc_easy", "capitals")


def test_damaged_assets_are_found_before_any_training(tmp_path: Path) -> None:
    path = tmp_path / "assets"
    path.mkdir()
    assets._embedded(path)
    (path / "eval_bundle" / "eval_data" / "factbook_recall.jsonl").unlink()
    with pytest.raises(ValueError, match=r"factbook_recall\.jsonl is missing"):
        assets.check(path)


def test_answers_after_the_mark_are_compared_as_numbers() -> None:
    ten = dialogue("5 + 5?", "#### 10")
    assert all(final_number(ten, f"so\n#### {said}") for said in ("10", "10.", "10.0", " 10 ", "$10"))
    assert not any(final_number(ten, f"#### {said}") for said in ("", "-10", "100", "1.0", "ten"))


def test_sample_seeds_do_not_collide() -> None:
    rng = random.Random(0)
    keys = {(rng.randrange(4), rng.randrange(500), rng.randrange(16)) for _ in range(2000)}
    assert len({chat_tasks.sample_seed(*key) for key in keys}) == len(keys)
