"""The engine gives what the naive full forward gives, for any mix of requests."""

import random
from typing import Any

import pytest
import torch

from nanochat_core.infer import engine as engine_module
from nanochat_core.infer.decoder import Decoder
from nanochat_core.infer.engine import Completion, Engine
from nanochat_core.infer.sampling import Sampler, Sampling, uniforms
from nanochat_core.infer.tool_use import ToolCalls
from nanochat_core.model.gpt import GPT


@torch.no_grad()
def naive(model: GPT, tokenizer, prompt: list[int], sampling: Sampling, tools: bool = True) -> Completion:
    """The slow twin: one row, no cache, the whole sequence again for every token."""
    ids, mask, forced = [], [], []
    calls = ToolCalls(tokenizer)
    numbers = uniforms(sampling.seed, sampling.max_tokens)
    sampler = Sampler([sampling], torch.device("cpu"))
    for step in range(sampling.max_tokens):
        logits = model(torch.tensor([[*prompt, *ids]]))[:, -1]
        token = int(sampler(logits, numbers[step : step + 1]))
        if forced:
            ids.append(forced.pop(0))
            mask.append(0)
            continue
        if token in (tokenizer.special("<|assistant_end|>"), tokenizer.bos):
            return Completion(ids, mask, token)
        ids.append(token)
        mask.append(1)
        if tools:
            forced += calls.follow(token)
    return Completion(ids, mask, None)


def requests(count: int, seed: int, vocab: int) -> tuple[list[list[int]], list[Sampling]]:
    """A mix: long and short prompts, some of them equal, greedy and every kind of sampling."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab) for _ in range(rng.choice([1, 2, 7, 20, 33]))] for _ in range(count)]
    for i in range(2, count, 3):
        prompts[i] = prompts[i - 1]
    kinds = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=1.0, top_k=50, top_p=0.9),
    ]
    samplings = [replace_seed(rng.choice(kinds), i, rng.randrange(1, 25)) for i in range(count)]
    return prompts, samplings


def replace_seed(sampling: Sampling, seed: int, max_tokens: int) -> Sampling:
    return sampling._replace(seed=seed, max_tokens=max_tokens)


@pytest.mark.parametrize("arch", ["seed", "modern"])
@pytest.mark.parametrize("max_rows", [1, 3, 32])
def test_cached_generation_matches_full_forward_for_any_mix(arch, max_rows, build, tokenizer) -> None:
    model = build(arch)
    prompts, samplings = requests(20, seed=max_rows, vocab=tokenizer.vocab_size)
    answers = Engine(model, tokenizer, max_rows=max_rows).complete(prompts, samplings)
    for prompt, sampling, answer in zip(prompts, samplings, answers, strict=True):
        assert answer == naive(model, tokenizer, prompt, sampling)


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_prompts_longer_than_a_chunk_are_read_in_pieces(arch, build, tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(engine_module.CHUNKS, "cpu", (20, 6))
    model = build(arch)
    prompts, samplings = requests(12, seed=5, vocab=tokenizer.vocab_size)
    answers = Engine(model, tokenizer, max_rows=4).complete(prompts, samplings)
    for prompt, sampling, answer in zip(prompts, samplings, answers, strict=True):
        assert answer == naive(model, tokenizer, prompt, sampling)


def test_requests_join_and_leave_a_running_batch(build, tokenizer) -> None:
    model = build()
    prompts, samplings = requests(9, seed=3, vocab=tokenizer.vocab_size)
    samplings = [s._replace(max_tokens=40 if i == 0 else 6) for i, s in enumerate(samplings)]
    engine = Engine(model, tokenizer, max_rows=4, tools=False)
    running = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        running.append(engine.submit(prompt, sampling))
        engine.step()
        engine.step()
    running[4].cancelled = True
    while engine.running or engine.waiting:
        engine.step()
    for i, request in enumerate(running):
        if i != 4:
            expected = naive(model, tokenizer, prompts[i], samplings[i], tools=False)
            assert request.completion() == expected


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many tokens each pass of a decoder has read."""
    sizes: list[int] = []
    original = Decoder.read

    def noted(self: Decoder, tokens: list[int], *rest: Any) -> torch.Tensor:
        sizes.append(len(tokens))
        return original(self, tokens, *rest)

    monkeypatch.setattr(Decoder, "read", noted)
    return sizes


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_a_shared_prompt_is_read_once(arch, build, tokenizer, read) -> None:
    model = build(arch)
    engine = Engine(model, tokenizer, max_rows=32, tools=False)
    prompts = [list(range(40))] * 16 + [list(range(100, 130))] * 16
    samplings = [Sampling(temperature=1.0, seed=i, max_tokens=3) for i in range(32)]
    answers = engine.complete(prompts, samplings)
    assert read[0] == 40 + 30  # each of the two once
    assert read[1] <= 2 + 30  # everyone else reads its last token only, for the logits after it
    assert len({tuple(a.ids) for a in answers[:16]}) > 8  # their first tokens differ too
    for prompt, sampling, answer in zip(prompts, samplings, answers, strict=True):
        assert answer == naive(model, tokenizer, prompt, sampling, tools=False)


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_a_common_beginning_is_read_once(arch, build, tokenizer, read) -> None:
    model = build(arch)
    engine = Engine(model, tokenizer, max_rows=8, tools=False)
    system = list(range(50, 80))
    prompts = [[*system, *ending] for ending in ([1, 2, 3], [9], [4, 4, 4, 4, 5])]
    answers = engine.complete(prompts, Sampling(max_tokens=4))
    assert read[:2] == [33, 1 + 1 + 5]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == naive(model, tokenizer, prompt, Sampling(max_tokens=4), tools=False)


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_the_next_turn_reads_only_what_is_new(arch, build, tokenizer, read) -> None:
    model = build(arch)
    engine = Engine(model, tokenizer, max_rows=1, tools=False)
    sampling = Sampling(temperature=1.0, seed=4, max_tokens=6)
    prompt = list(range(30))
    new = len(prompt)
    for _ in range(3):
        read.clear()
        (answer,) = engine.complete([prompt], sampling)
        assert answer == naive(model, tokenizer, prompt, sampling, tools=False)
        assert read[0] == new
        prompt = [*prompt, *answer.ids, 7, 8, 9]
        new = 3 if answer.ended else 4  # the token that filled the room was never read


def test_newcomers_are_read_in_the_passes_of_those_who_run(build, tokenizer, read) -> None:
    engine = Engine(build(), tokenizer, max_rows=4, tools=False)
    first = engine.submit([1, 2], Sampling(max_tokens=90))
    engine.step()
    second = engine.submit(list(range(20)), Sampling(max_tokens=2))
    engine.step()
    assert read == [2, 1 + 20]
    assert len(first.ids) == 2 and len(second.ids) == 1


def test_a_request_has_its_own_stop_tokens(parrot, tokenizer) -> None:
    engine = Engine(parrot([1, 2, 3, 4, 5]), tokenizer)
    plain, stopped = engine.complete(
        [[1], [1]], [Sampling(max_tokens=3), Sampling(max_tokens=3, stop=(3, 4))]
    )
    assert plain == Completion([2, 3, 4], [1, 1, 1], None)
    assert stopped == Completion([2], [1], 3)


def test_a_tool_call_is_answered_in_place_and_masked(parrot, tokenizer) -> None:
    """The output stands right behind the call, and what comes after it is the model's again."""
    special, encode = tokenizer.special, tokenizer.encode
    call = [special("<|python_start|>"), *encode("12*3"), special("<|python_end|>")]
    output = [special("<|output_start|>"), *encode("36"), special("<|output_end|>")]
    model = parrot([1, *call, 2], [output[-1], *encode("ok"), special("<|assistant_end|>")])
    (answer,) = Engine(model, tokenizer, max_rows=2).complete([[2, 1]], Sampling(max_tokens=50))
    assert answer.ids == [*call, *output, *tokenizer.encode("ok")]
    assert answer.mask == [1] * len(call) + [0] * len(output) + [1] * 2
    assert answer.ended
    (plain,) = Engine(model, tokenizer, tools=False).complete([[2, 1]], Sampling(max_tokens=7))
    assert plain.ids == [*call, 2] and plain.mask == [1] * 7


def test_running_out_of_room_is_not_an_end(build, tokenizer) -> None:
    engine = Engine(build(), tokenizer, context=12)
    (answer,) = engine.complete([[1] * 10], Sampling(max_tokens=50))
    assert answer.ended or len(answer.ids) == 2
    with pytest.raises(ValueError, match="the prompt has 12 tokens"):
        engine.submit([1] * 12, Sampling())
    with pytest.raises(ValueError, match="empty"):
        engine.submit([], Sampling())


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"max_tokens": 0}])
def test_settings_without_a_meaning_are_refused(bad, build, tokenizer) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Engine(build(), tokenizer).submit([1], Sampling(**bad))


def test_a_closed_stream_frees_its_row(build, tokenizer) -> None:
    engine = Engine(build(), tokenizer, max_rows=1, tools=False)
    stream = engine.stream([3, 4], Sampling(max_tokens=80, temperature=1.0))
    next(stream)
    assert engine.running == 1
    stream.close()
    engine.step()
    assert engine.running == 0


def test_streaming_gives_the_tokens_of_complete(build, tokenizer) -> None:
    engine = Engine(build(), tokenizer)
    sampling = Sampling(temperature=1.0, seed=9, max_tokens=20)
    (answer,) = engine.complete([[5, 6, 7]], sampling)
    assert list(engine.stream([5, 6, 7], sampling)) == answer.ids


def test_the_cache_grows_for_a_longer_request_and_keeps_what_runs(build, tokenizer) -> None:
    model = build()
    engine = Engine(model, tokenizer, max_rows=3, tools=False)
    short, long = Sampling(max_tokens=30), Sampling(max_tokens=90, temperature=1.0, seed=4)
    first = engine.submit([1, 2, 3], short)
    for _ in range(5):
        engine.step()
    second = engine.submit([4, 5], long)
    while not (first.done and second.done):
        engine.step()
    assert first.completion() == naive(model, tokenizer, [1, 2, 3], short, tools=False)
    assert second.completion() == naive(model, tokenizer, [4, 5], long, tools=False)


def test_a_training_model_can_sample_and_go_on_training(build, tokenizer) -> None:
    model = build("modern").requires_grad_(True)
    Engine(model, tokenizer).complete([[1, 2]], Sampling(max_tokens=4))
    total, _ = model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]), torch.ones(1, 3))
    total.backward()
    assert model.blocks[0].attn.c_q.weight.grad is not None


def test_a_model_that_computes_in_bf16_follows_its_master_weights(build, tokenizer) -> None:
    model = build("modern", n_embd=64).requires_grad_(True)
    model.compute_dtype = torch.bfloat16
    engine = Engine(model, tokenizer, tools=False)
    for _ in range(2):
        prompt = [1, 2, 3, 4]
        (answer,) = engine.complete([prompt], Sampling(max_tokens=1))
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0, -1]
            assert answer.ended or logits[answer.ids[0]] > logits.max() - 0.2
            model.lm_head.weight.neg_()
