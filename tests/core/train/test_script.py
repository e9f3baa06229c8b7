"""`fit` as a script calls it: the one loop, its resumption, and errors that say what to do."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from test_loop import same
from tinytrain import WORLD, documents, job_in, tiny_model

from nanochat_core.data.packed import packed
from nanochat_core.data.streams import Stream, conversation_batches, text_batches
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.exported import save
from nanochat_core.machine.ranks import pick_dtype
from nanochat_core.model.gpt import GPT
from nanochat_core.optim.groups import Group
from nanochat_core.optim.schedule import Rates, Schedule
from nanochat_core.runner.models import load
from nanochat_core.sources.documents import Shard
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train import loop
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.loop import Hook
from nanochat_core.train.script import fit
from nanochat_core.train.setup import new_state

STEPS = 6


@pytest.fixture(scope="module")
def batches(tokenizer: Tokenizer) -> Stream:
    return text_batches(documents(60), tokenizer, rows=4, T=32)


def weights(model: GPT) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in history if "loss" in row]


def sign_descent(
    p: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, **how: Any
) -> None:
    mean.lerp_(grad, 0.1)
    p.sub_(mean.sign(), alpha=how["lr"])


def own_groups(model: GPT) -> list[Group]:
    names, params = zip(*model.named_parameters(), strict=True)
    return [Group("elementwise", names, params, lr=0.003, rule=sign_descent)]


def test_fit_trains_as_the_stages_do(tokenizer: Tokenizer, batches: Stream, tmp_path: Path) -> None:
    schedule = Schedule(warmup_steps=2)
    mine, theirs = tiny_model(tokenizer), tiny_model(tokenizer)
    history = fit(mine, batches, steps=STEPS, schedule=schedule, device="cpu")
    job = job_in(tmp_path / "job")
    dtype = pick_dtype(job.runtime, torch.device("cpu"))
    state = new_state(theirs, Rates(), type(WORLD)(0, 1, torch.device("cpu"), dtype))
    loop.fit(job, WORLD, state, lambda state: batches(state.cursor), steps=STEPS, schedule=schedule)
    assert same(weights(mine), weights(theirs))
    assert [row["step"] for row in history] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("groups", [None, own_groups], ids=["nanochat's", "an own rule"])
def test_a_second_call_resumes_as_if_never_interrupted(
    groups: Any, tokenizer: Tokenizer, batches: Stream, tmp_path: Path
) -> None:
    def trained(directory: Path | None, *hooks: Hook) -> tuple[GPT, list[float]]:
        model = tiny_model(tokenizer)
        rules = None if groups is None else groups(model)
        return model, losses(fit(model, batches, steps=STEPS, groups=rules, directory=directory, hooks=hooks))

    def ctrl_c(state: TrainState) -> dict[str, Any]:
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    whole, expected = trained(None)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "run", Hook(1, ctrl_c))
    resumed, found = trained(tmp_path / "run")
    assert found == expected
    assert same(weights(resumed), weights(whole))


def test_rows_are_logged_as_they_come(tokenizer: Tokenizer, batches: Stream) -> None:
    seen: list[dict[str, Any]] = []
    counted = Hook(3, lambda state: {"batches": state.drawn})
    history = fit(tiny_model(tokenizer), batches, steps=3, hooks=[counted], log=seen.append)
    assert [row["batches"] for row in history if "batches" in row] == [0, 3]
    assert [{k: v for k, v in row.items() if k != "time"} for row in history] == seen


def test_a_trained_model_is_saved_and_loaded(tokenizer: Tokenizer, batches: Stream, tmp_path: Path) -> None:
    model = tiny_model(tokenizer)
    fit(model, batches, steps=2)
    save(model, tokenizer, tmp_path / "mine")
    name, loaded, same_tokenizer = load(tmp_path / "mine", device="cpu")
    assert name == "mine" and same_tokenizer.fingerprint == tokenizer.fingerprint
    assert same(weights(loaded), weights(model))
    text = Engine(loaded, same_tokenizer).continue_text("the cat")
    assert text and text == Engine(model, tokenizer).continue_text("the cat")


def test_texts_in_memory_are_packed_like_those_of_a_shard(tokenizer: Tokenizer, shards: list[Shard]) -> None:
    shard = shards[0]
    of_memory = text_batches([*documents(80)[:40], "", "  "], tokenizer, rows=2, T=32)({})
    of_shard = packed([shard], tokenizer, rows=2, T=32, cursor={})
    for _ in range(5):
        assert torch.equal(next(of_memory).inputs, next(of_shard).inputs)


def test_errors_say_what_to_do(
    tokenizer: Tokenizer, batches: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no text"):
        text_batches(["", " \n"], tokenizer, rows=1, T=8)
    with pytest.raises(ValueError, match="no conversations"):
        conversation_batches([], tokenizer, rows=1, T=8)
    with pytest.raises(ValueError, match="steps is 0"):
        fit(tiny_model(tokenizer), batches, steps=0)
    with pytest.raises(ValueError, match="there is no directory"):
        load("./nowhere", base_dir=tmp_path)
    with pytest.raises(ValueError, match="try: nanochat run"):
        load(base_dir=tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="run the script with python"):
        fit(tiny_model(tokenizer), batches, steps=1)
