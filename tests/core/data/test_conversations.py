"""Conversations in rows: whole, masked, never without an answer, exactly continued; and rollouts as
batches."""

import json
from typing import Any

import pytest
import torch

from nanochat_core.data.conversations import packed_conversations
from nanochat_core.infer.engine import Completion
from nanochat_core.tokenizer.bpe import Tokenizer, train
from nanochat_core.tokenizer.render import Conversation, render_conversation
from nanochat_core.train.rollouts import Answers, question_at, to_batch


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(["what is the capital of france it is paris " * 3], 280)


def talk(question: str, answer: str) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


TALKS = [talk(f"what is {i}", f"it is {i * i} " * (1 + i % 4)) for i in range(30)]


def stream(tokenizer: Tokenizer, talks: list[Conversation] = TALKS, **options: Any) -> Any:
    settings = {"rows": 2, "T": 64, "loss_on": "assistant", "cursor": {}} | options
    return packed_conversations(talks, tokenizer, **settings)


@pytest.mark.parametrize("rows", [1, 2, 7, 500])
def test_an_epoch_teaches_every_answer_once(tokenizer: Tokenizer, rows: int) -> None:
    learned = [int(t) for b in stream(tokenizer, epochs=1, rows=rows) for t in b.targets.flatten() if t >= 0]
    wanted = []
    for conversation in TALKS:
        ids, mask = render_conversation(tokenizer, conversation)
        wanted += [t for t, m in zip(ids, mask, strict=True) if m]
    assert sorted(learned) == sorted(wanted)


def test_questions_are_read_but_not_learned(tokenizer: Tokenizer) -> None:
    batch = next(stream(tokenizer))
    text = tokenizer.decode([t for t in batch.targets[0].tolist() if t >= 0])
    assert "it is" in text and "what" not in text
    assert batch.count == float((batch.targets >= 0).sum()) == float(batch.weights.sum())


def test_all_can_be_learned_as_it_was_in_2025(tokenizer: Tokenizer) -> None:
    calls: Conversation = {
        "messages": [
            {"role": "user", "content": "what is 2"},
            {"role": "assistant", "content": [
                {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "222"}]},
        ]
    }  # fmt: skip
    ids = render_conversation(tokenizer, calls).ids
    learned = {
        loss_on: [t for t in next(stream(tokenizer, [calls], loss_on=loss_on)).targets[0].tolist() if t >= 0]
        for loss_on in ("assistant", "all")
    }
    assert learned["all"][: len(ids) - 1] == ids[1:]  # questions and tool output too
    text = tokenizer.decode(learned["assistant"])
    assert "1+1" in text and "222" not in text and "what" not in text


def test_overlong_conversations_end_with_a_whole_turn(tokenizer: Tokenizer) -> None:
    turns = talk("what is it", "it is paris")["messages"] * 30
    batch = next(stream(tokenizer, [{"messages": turns}], T=120, rows=1))
    ends = (batch.targets[0] == tokenizer.special("<|assistant_end|>")).nonzero().flatten().tolist()
    assert len(ends) > 2 and (batch.targets[0, ends[-1] + 1 :] == -1).all()
    whole = len(render_conversation(tokenizer, talk("what is it", "it is paris")).ids) - 1
    assert ends[-1] + 1 > 120 - whole  # not one turn fewer than fit


@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_no_batch_is_all_masked(tokenizer: Tokenizer, loss_on: str) -> None:
    mean = [talk("what " * 90, "it is"), talk("what " * 17, "paris"), {"messages": TALKS[0]["messages"][:1]}]
    batches = [*stream(tokenizer, [*mean, *TALKS, *mean], epochs=3, rows=1, loss_on=loss_on)]
    assert len(batches) > 5 and all(batch.count > 0 for batch in batches)


def test_targets_are_what_follows_in_the_row(tokenizer: Tokenizer) -> None:
    for _, batch in zip(range(20), stream(tokenizer), strict=False):
        active = batch.targets[:, :-1] >= 0
        assert torch.equal(batch.targets[:, :-1][active], batch.inputs[:, 1:][active])


def test_no_row_is_without_something_to_learn(tokenizer: Tokenizer) -> None:
    long_questions = [talk("what " * 100, "paris"), *TALKS]  # cut before its answer begins
    for batch in stream(tokenizer, long_questions, epochs=2):
        full = batch.inputs.ne(tokenizer.bos).any(dim=1)
        assert ((batch.targets >= 0).any(dim=1) == full).all()


def test_only_unanswerable_conversations_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no conversation has an answer within 64 tokens"):
        next(stream(tokenizer, [talk("what " * 100, "paris")] * 3))


@pytest.mark.parametrize("at", [1, 4, 11])
@pytest.mark.parametrize("size", [1, 2])
def test_a_cursor_continues_exactly(at: int, size: int, tokenizer: Tokenizer) -> None:
    straight = [b for b, _ in zip(stream(tokenizer, rank=size - 1, size=size), range(at + 4), strict=False)]
    cursor = json.loads(json.dumps(straight[at - 1].cursor()))
    resumed = stream(tokenizer, rank=size - 1, size=size, cursor=cursor)
    for a, b in zip(straight[at:], resumed, strict=False):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("batches", [0, 2])
def test_another_number_of_ranks_reads_each_conversation_once(
    before: int, after: int, batches: int, tokenizer: Tokenizer
) -> None:
    def taken(n: int, **options: Any) -> tuple[list[int], dict[str, Any]]:
        found = [batch for batch, _ in zip(stream(tokenizer, epochs=1, **options), range(n), strict=False)]
        learned = [int(t) for batch in found for t in batch.targets.flatten() if t >= 0]
        return learned, found[-1].cursor() if found else {}

    whole, _ = taken(100)
    first = [taken(batches, rank=r, size=before) for r in range(before)]
    cursor = json.loads(json.dumps({"ranks": [place for _, place in first]}))
    rest = [taken(100, rank=r, size=after, cursor=cursor) for r in range(after)]
    assert sorted(t for learned, _ in first + rest for t in learned) == sorted(whole)


def test_advantages_weigh_the_tokens_the_model_chose(tokenizer: Tokenizer) -> None:
    end = tokenizer.special("<|assistant_end|>")
    answers = Answers(
        prompts=[[1, 2]] * 2 + [[3]] * 2,
        completions=[
            Completion([10, 11, 12], [1, 0, 1], end),  # right; 11 was put in by a tool
            Completion([13], [1], None),  # wrong, and cut off
            Completion([14], [1], end),
            Completion([15], [1], end),
        ],
        rewards=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
    )
    batch = to_batch(answers, tokenizer, step=1)
    assert batch.inputs.tolist() == [[1, 2, 10, 11, 12], [1, 2, tokenizer.bos, tokenizer.bos, tokenizer.bos]]
    assert batch.targets.tolist() == [[-1, 10, -1, 12, end], [-1, 13, -1, -1, -1]]
    assert batch.weights.tolist() == [[0, 0.5, 0, 0.5, 0.5], [0, -0.5, 0, 0, 0]]
    assert batch.count == 3 + 1 + 2 + 2  # all tokens chosen, of questions that teach nothing too
    assert batch.notes["alike"] == 0.5


def test_a_step_where_all_did_alike_moves_nothing(tokenizer: Tokenizer) -> None:
    answers = Answers([[1]] * 2, [Completion([5], [1], tokenizer.bos)] * 2, torch.ones(1, 2))
    batch = to_batch(answers, tokenizer, step=1)
    assert batch.inputs.numel() and not batch.weights.any()


def test_equal_rewards_that_floats_do_not_average_exactly_teach_nothing(tokenizer: Tokenizer) -> None:
    rewards = torch.full((1, 11), 0.1)
    assert (rewards - rewards.mean()).any()  # about 1e-8
    answers = Answers([[1]] * 11, [Completion([5], [1], None)] * 11, rewards)
    batch = to_batch(answers, tokenizer, step=1)
    assert not batch.weights.any() and batch.notes["alike"] == 1


def test_the_end_that_is_learned_is_the_one_that_was_sampled(tokenizer: Tokenizer) -> None:
    ends = [tokenizer.special("<|assistant_end|>"), tokenizer.bos]
    answers = Answers([[1]] * 2, [Completion([5], [1], end) for end in ends], torch.tensor([[1.0, 0.0]]))
    batch = to_batch(answers, tokenizer, step=1)
    assert batch.targets.tolist() == [[5, end] for end in ends]
    assert batch.weights.tolist() == [[0.5, 0.5], [-0.5, -0.5]]


def test_questions_come_once_an_epoch_in_an_order_of_the_seed() -> None:
    first = [question_at(i, 7, seed=1) for i in range(7)]
    second = [question_at(i, 7, seed=1) for i in range(7, 14)]
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
