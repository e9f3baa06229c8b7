"""Reinforcement learning that goes wrong: seen in time, told, and the best model kept, kill or no kill."""

import dataclasses
import hashlib
import json
import os
import socket
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tinytrain import tiny_model

from nanochat_core.artifacts.stage import Interrupted, Job, Metrics, Runtime
from nanochat_core.data import tasks
from nanochat_core.data.tasks.base import Problem, Rows, dialogue
from nanochat_core.model.gpt import write_config
from nanochat_core.stages import rl
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train import loop
from nanochat_core.train.checkpoint import TrainState, save_model
from nanochat_core.train.collapse import Best, CollapseLimits, Monitor
from nanochat_core.train.rollouts import Vitals

START = Vitals(reward=0.4, entropy=0.5, length=20.0, unfinished=0.1)
LIMITS = CollapseLimits(
    window=4,
    questions=16,
    problems=64,
    reward_drop=0.5,
    entropy_low=0.05,
    entropy_high=4.0,
    length_low=0.25,
    unfinished_rise=0.5,
)


def verdicts(limits: CollapseLimits = LIMITS, **series: list[float]) -> list[str | None]:
    """What the monitor says at each step of a series, the other vitals staying as they were at the start."""
    monitor = Monitor(limits, START)
    steps = len(next(iter(series.values())))
    rows = [{key: values[i] for key, values in series.items()} for i in range(steps)]
    return [monitor.see(START._replace(**row)) for row in rows]


def test_a_healthy_run_is_left_alone() -> None:
    rising = [0.4 + 0.01 * i for i in range(40)]
    assert not any(verdicts(reward=rising, entropy=[0.5 * 0.9**i for i in range(40)]))
    assert not any(verdicts(reward=[0.5, 0.3] * 20))  # noise of a step is not a fall


def test_a_reward_that_loses_half_of_its_best_ends_the_run() -> None:
    found = verdicts(reward=[0.8] * 6 + [0.2] * 6)
    # means of four: .8 .8 .8 .65 .5 .35 ...: the third low step brings the mean under half of .8
    assert next(i for i, why in enumerate(found) if why) == 8
    assert found[8] == "the reward fell from 0.800 to 0.350 over the last 4 steps"


def test_a_fall_within_the_noise_is_not_believed() -> None:
    low = Vitals(0.04, 0.5, 20.0, 0.1)  # 64 questions at .04: three standard errors are .073
    monitor = Monitor(LIMITS, low)
    assert not any(monitor.see(low._replace(reward=0.0)) for _ in range(20))
    many = dataclasses.replace(LIMITS, questions=160)  # of ten times as many, .023
    monitor = Monitor(many, low)
    assert any(monitor.see(low._replace(reward=0.0)) for _ in range(20))


@pytest.mark.parametrize(
    ("series", "said"),
    [
        ({"entropy": [0.01] * 6, "reward": [0.4] * 6}, "entropy fell from 0.500 to 0.010 nats a token"),
        ({"entropy": [2.5] * 6}, "entropy rose from 0.500 to 2.500"),
        ({"length": [3.0] * 6}, "answers shrank from 20.0 to 3.0 tokens"),
        ({"unfinished": [0.8] * 6}, "answers that never end went from 10% to 80%"),
    ],
)
def test_entropy_and_length_have_limits_of_their_own(series: dict[str, list[float]], said: str) -> None:
    found = verdicts(**series)
    assert found[:3] == [None] * 3  # a whole window first
    assert said in str(found[3])
    unlimited = CollapseLimits(4, 16, 64, 1.0, 0.0, 1e9, 0.0, 1.0)
    assert not any(verdicts(unlimited, **series))


def test_a_held_out_reward_that_falls_ends_the_run_whatever_training_pays() -> None:
    monitor = Monitor(LIMITS, START)
    for reward in (0.5, 0.3, 0.6):  # .3 is within the noise of 64 problems
        monitor.examined(reward)
        assert monitor.see(START._replace(reward=0.9)) is None
    monitor.examined(0.2)
    assert monitor.see(START) == "the reward on held-out problems fell from 0.600 to 0.200"


def test_a_sure_policy_that_is_right_is_no_collapse() -> None:
    assert not any(verdicts(entropy=[0.001] * 8, reward=[0.9] * 8))


def test_a_monitor_goes_on_from_what_the_checkpoint_knows() -> None:
    straight, first = Monitor(LIMITS, START), Monitor(LIMITS, START)
    rows = [START._replace(reward=0.8 - 0.06 * i) for i in range(12)]
    told = [straight.see(row) for row in rows]
    before = [first.see(row) for row in rows[:5]]
    second = Monitor.restored(LIMITS, json.loads(json.dumps(first.state())))
    assert before + [second.see(row) for row in rows[5:]] == told
    assert any(told) and second.state() == straight.state()


def test_the_best_model_is_kept_and_a_damaged_one_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model, best = tiny_model(tokenizer), Best(tmp_path)
    with pytest.raises(ValueError, match=r"best model in .* is damaged"):
        best.restore(model)
    weight = model.wte.weight.detach()
    for step, reward in ((0, 0.1), (4, 0.5), (8, 0.3)):
        weight.fill_(step)
        best.offer(model, step, reward)
    assert best.restore(model) == (4, 0.5) and float(weight.max()) == 4
    best.offer(model, 2, 0.2)  # the run went back to step 2: what came after it is not known yet
    assert best.kept() == (2, 0.2)
    path = best.directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="--rerun rl"):
        best.restore(model)


# ------------------------------------------------------------------------------------------ the stage itself


def wants_an_e(split: str, size: int | None, assets: Path | None) -> Rows:
    """A made task that a random model sometimes solves: an `e` somewhere in a few tokens."""

    def row(index: int) -> Problem:
        return dialogue(f"say {'over and '[: 1 + index % 8]}", "the")

    def has_an_e(conversation: Problem, answer: str) -> bool:
        return "e" in answer

    return Rows("wants_an_e", size or 64, row, has_an_e)


def pays_for_nothing(split: str, size: int | None, assets: Path | None) -> Rows:
    """The same, but the marking of its train split can be cheated: the less is said the better."""

    def is_short(conversation: Problem, answer: str) -> bool:
        return len(answer) < 3

    honest = wants_an_e(split, size, assets)
    return dataclasses.replace(honest, matches=is_short) if split == "train" else honest


@pytest.fixture
def job(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """A job of the rl stage over an untrained model."""
    monkeypatch.setitem(tasks.TASKS, "wants_an_e", wants_an_e)
    monkeypatch.setitem(tasks.TASKS, "pays_for_nothing", pays_for_nothing)
    at = tmp_path / "model"
    at.mkdir()
    model = tiny_model(tokenizer, T=48)
    with torch.no_grad():  # as drawn it says everything alike; so it has habits that can be broken
        model.lm_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    tokenizer.save(at)
    write_config(at, model.config, tokenizer.fingerprint)
    save_model(at, model)

    def made(name: str, **recipe: Any) -> Job:
        config = rl.Config.model_validate(
            {
                "task": "wants_an_e",
                "questions": 4,
                "samples": 4,
                "max_tokens": 6,
                "eval_every": 4,
                "eval_problems": 64,
                "eval_samples": 4,
                "watch": 3,
                "lr_fraction": 0.05,
            }
            | recipe
        )
        path = tmp_path / "rl" / name
        path.mkdir(parents=True, exist_ok=True)
        runtime = Runtime(base_dir=tmp_path, device="cpu", precision="fp32", threads=1, compile=False)
        return Job("rl", config, {"model": at, "tokenizer": at}, path, runtime, name)

    return made


def outcome(job: Job) -> tuple[str, list[dict[str, Any]]]:
    """The weights left, and all that was recorded but the clock and the memory."""
    rows = [json.loads(line) for line in (job.path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("time", "tokens_per_s", "tflops", "eta_s", "memory_gb"):
            row.pop(key, None)
    return hashlib.sha256((job.path / "model.safetensors").read_bytes()).hexdigest(), rows


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """End the stage's next run after step `at`, with no checkpoint of it: as a power cut does."""
    real = loop.fit

    def cut(job: Job, world: Any, state: TrainState, batches: Any, **options: Any) -> None:
        def until(state: TrainState, stream: Any) -> Any:
            for batch in stream:
                if state.step == at:
                    raise Interrupted
                yield batch

        monkeypatch.setattr(loop, "fit", real)
        real(job, world, state, lambda state: until(state, batches(state)), **options)

    monkeypatch.setattr(loop, "fit", cut)


PLANTED = {"task": "pays_for_nothing", "steps": 40, "lr_fraction": 2.0, "warmdown": 0.0}


def test_a_planted_collapse_stops_and_keeps_the_best(job: Callable[..., Job]) -> None:
    planted = job("planted", **PLANTED)
    metrics = rl.run(planted.config, planted)
    stopped, kept = metrics["stopped_at"], metrics["steps"]
    assert isinstance(stopped, int) and isinstance(kept, int) and kept < stopped < 40
    assert str(metrics["stopped"]).startswith(f"stopped at step {stopped} because ")
    assert str(metrics["stopped"]).endswith(f"; kept step {kept}")
    _, rows = outcome(planted)
    examined = {row["step"]: row["eval_reward"] for row in rows if "eval_reward" in row}
    assert metrics["reward"] == examined[kept] == max(examined.values())
    assert rows[-1]["note"] == metrics["stopped"]
    kept_weights = (planted.path / "checkpoints" / "best" / "model.safetensors").read_bytes()
    assert kept_weights == (planted.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("at", [5, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_run_stops_where_the_other_would_have(
    at: int, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = job("whole", **PLANTED), job("parts", **PLANTED)
    expected: Metrics = rl.run(whole.config, whole)
    interrupt(monkeypatch, at)
    with pytest.raises(Interrupted):
        rl.run(parts.config, parts)
    assert rl.run(parts.config, parts) == expected
    assert outcome(parts) == outcome(whole)


def test_a_gentle_run_ends_at_its_last_step_with_pass_at_k(job: Callable[..., Job]) -> None:
    gentle = job("gentle", steps=8)
    metrics = rl.run(gentle.config, gentle)
    assert metrics["steps"] == 8 and "stopped" not in metrics
    _, rows = outcome(gentle)
    for row in (row for row in rows if "eval_reward" in row):
        assert row["eval_reward"] <= row["eval_pass_at_2"] <= row["eval_pass_at_4"] <= 1
        lines = (gentle.path / "answers" / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        rewards = [json.loads(line)["rewards"] for line in lines]
        assert len(rewards) == 64 and sum(map(sum, rewards)) / 256 == pytest.approx(row["eval_reward"])
        noise = statistics.stdev(map(statistics.mean, rewards)) / 8  # over the square root of 64 problems
        assert row["eval_reward_se"] == pytest.approx(noise)
    assert metrics["pass_at_4_start"] == rows[0]["eval_pass_at_4"]
    assert metrics["reward_se_start"] == rows[0]["eval_reward_se"] and metrics["reward_se"] != 0


def on_one_of_two(rank: int, job: Job, port: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tasks.TASKS["wants_an_e"] = wants_an_e
    metrics = rl.run(job.config, job)
    assert bool(metrics) == (rank == 0)
    if metrics:
        (job.path / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.slow
def test_two_ranks_ask_the_same_and_see_the_same(job: Callable[..., Job]) -> None:
    """Until the first step, that is: then sums are added in another order, and an answer may flip."""
    alone, shared = job("alone", steps=1), job("shared", steps=1)
    expected = rl.run(alone.config, alone)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(on_one_of_two, args=(shared, port), nprocs=2)  # type: ignore[no-untyped-call]
    metrics = json.loads((shared.path / "metrics.json").read_text())
    for key in ("reward_start", "reward_se_start"):
        assert metrics[key] == pytest.approx(expected[key])
    (_, one), (_, two) = outcome(alone), outcome(shared)
    for key in ("reward", "entropy", "length", "unfinished", "loss", "grad_norm"):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-3), key
    first = "answers/step_000000.jsonl"
    assert (shared.path / first).read_bytes() == (alone.path / first).read_bytes()
