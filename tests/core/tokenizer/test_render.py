"""Conversations as ids and mask."""

from typing import Any

import pytest

from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.render import render_conversation, render_for_completion

TOKENIZER = Tokenizer([(ord("h"), ord("i"))])  # "hi" is 256; the specials are 257 to 265
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(257, 266)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def conversation(*messages: Any) -> Any:
    return {"messages": list(messages)}


def test_a_conversation_with_system_tool_call_and_output() -> None:
    rendered = render_conversation(
        TOKENIZER,
        conversation(
            {"role": "system", "content": "be"},
            user("1+1"),
            assistant(
                [
                    {"type": "text", "text": "hi"},
                    {"type": "python", "text": "1+1"},
                    {"type": "python_output", "text": "2"},
                    {"type": "text", "text": "=2"},
                ]
            ),
            user("ok"),
            assistant("hi!"),
        ),
    )
    # fmt: off
    assert list(zip(*rendered, strict=True)) == [
        (BOS, 0),
        (USER, 0), (98, 0), (101, 0), (10, 0), (10, 0), (49, 0), (43, 0), (49, 0), (USER_END, 0),
        (ASSISTANT, 0), (256, 1),
        (PYTHON, 1), (49, 1), (43, 1), (49, 1), (PYTHON_END, 1),
        (OUTPUT, 0), (50, 0), (OUTPUT_END, 0),
        (61, 1), (50, 1), (ASSISTANT_END, 1),
        (USER, 0), (111, 0), (107, 0), (USER_END, 0),
        (ASSISTANT, 0), (256, 1), (33, 1), (ASSISTANT_END, 1),
    ]
    # fmt: on


def test_the_prompt_for_a_completion_drops_the_last_answer_and_opens_the_next() -> None:
    expected = [BOS, USER, 97, USER_END, ASSISTANT]
    assert render_for_completion(TOKENIZER, conversation(user("a"))) == expected
    assert render_for_completion(TOKENIZER, conversation(user("a"), assistant("dropped"))) == expected


def test_the_prompt_is_how_the_rendered_conversation_begins() -> None:
    talk = conversation(user("a"), assistant("b"), user("c"), assistant("d"))
    prompt = render_for_completion(TOKENIZER, talk)
    assert render_conversation(TOKENIZER, talk).ids[: len(prompt)] == prompt


def test_special_tokens_in_messages_stay_text() -> None:
    rendered = render_conversation(TOKENIZER, conversation(user("<|assistant_start|>"), assistant("<|bos|>")))
    assert rendered.ids.count(ASSISTANT) == 1
    assert rendered.ids.count(BOS) == 1


def test_a_long_conversation_is_cut_at_a_turn() -> None:
    talk = conversation(user("a"), assistant("b"), user("c"), assistant("d"))
    whole = render_conversation(TOKENIZER, talk)
    assert len(whole.ids) == 13
    assert render_conversation(TOKENIZER, talk, max_tokens=13) == whole
    for max_tokens in range(7, 13):
        cut = render_conversation(TOKENIZER, talk, max_tokens)
        assert cut.ids == whole.ids[:7]
        assert cut.ids[-1] == ASSISTANT_END


def test_a_first_exchange_that_does_not_fit_is_cut_short() -> None:
    rendered = render_conversation(TOKENIZER, conversation(user("a"), assistant("b" * 50)), max_tokens=20)
    assert len(rendered.ids) == len(rendered.mask) == 20
    assert sum(rendered.mask) == 15


def test_the_caller_keeps_its_conversation() -> None:
    talk = conversation({"role": "system", "content": "s"}, user("a"), assistant("b"))
    before = repr(talk)
    render_conversation(TOKENIZER, talk)
    render_for_completion(TOKENIZER, talk)
    assert repr(talk) == before


@pytest.mark.parametrize(
    ("talk", "sentence"),
    [
        ([], "a conversation is a dict with a list of at least one message"),
        ({"messages": []}, "a conversation is a dict with a list of at least one message"),
        (conversation("hi"), "message 0 is not a dict with 'role' and 'content'"),
        (conversation({"role": "user"}), "message 0 is not a dict with 'role' and 'content'"),
        (conversation({"role": "tool", "content": ""}), "message 0 has role 'tool'; there are 'system'"),
        (conversation(assistant("a")), "message 0 has role 'assistant' where 'user' is due"),
        (conversation(user("a"), user("b")), "message 1 has role 'user' where 'assistant' is due"),
        (
            conversation({"role": "system", "content": "s"}, user("a"), user("b")),
            "message 2 has role 'user' where 'assistant' is due",
        ),
        (conversation({"role": "system", "content": "s"}), "message 0 is the system's, so message 1 must be"),
        (
            conversation(user("a"), assistant("b"), {"role": "system", "content": "s"}),
            "message 2 has role 'system' where 'user' is due",
        ),
        (conversation(user(None)), r"message 0 \(user\) has content of type NoneType; it must be a str"),
        (conversation(user([])), r"message 0 \(user\) has content of type list; it must be a str"),
        (conversation(user("a"), assistant(3)), "has content that is neither a str nor a list of parts"),
        (conversation(user("a"), assistant([])), "has content that is neither a str nor a list of parts"),
        (
            conversation(user("a"), assistant([{"type": "image", "text": ""}])),
            r"message 1 \(assistant\), part 0 has type 'image'; known are text, python, python_output",
        ),
        (
            conversation(user("a"), assistant([{"type": "text", "text": "b"}, {"type": "python"}])),
            r"message 1 \(assistant\), part 1 \(python\) has no 'text' that is a str",
        ),
    ],
)
def test_a_malformed_conversation_is_an_error_that_names_the_message(talk: Any, sentence: str) -> None:
    for render in (render_conversation, render_for_completion):
        with pytest.raises(ValueError, match=sentence):
            render(TOKENIZER, talk)
