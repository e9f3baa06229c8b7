"""Conversations as ids, with a mask of what the assistant is to learn: its words and its tool calls."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from nanochat_core.tokenizer.bpe import Tokenizer


class Part(TypedDict):
    """A piece of an assistant's message: text, a call of the python tool, or what the tool answered."""

    type: Literal["text", "python", "python_output"]
    text: str


class Message(TypedDict):
    """What one of the three said; only an assistant's message has parts."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class Conversation(TypedDict):
    """Perhaps a system message, then user and assistant in turn."""

    messages: list[Message]
    letters: NotRequired[list[str]]  # the choices of a categorical task


class Rendered(NamedTuple):
    """Ids and, for each, 1 if the assistant is to learn it."""

    ids: list[int]
    mask: list[int]


def render_conversation(tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048) -> Rendered:
    """The conversation, or as many of its exchanges as fit; a first one that does not fit is cut short."""
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a conversation takes at least 1")
    rendered = Rendered([tokenizer.bos], [0])
    fits = 0  # where the last whole exchange that fits ends
    for message in checked(conversation):
        _add_message(rendered, tokenizer, message)
        if len(rendered.ids) > max_tokens:
            end = fits or max_tokens
            return Rendered(rendered.ids[:end], rendered.mask[:end])
        if message["role"] == "assistant":
            fits = len(rendered.ids)
    return rendered


def render_for_completion(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """What the assistant is to answer: all but a last message of its own, then the start of its turn."""
    messages = checked(conversation)
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    rendered = Rendered([tokenizer.bos], [0])
    for message in messages:
        _add_message(rendered, tokenizer, message)
    return [*rendered.ids, tokenizer.special("<|assistant_start|>")]


def _add_message(rendered: Rendered, tokenizer: Tokenizer, message: Message) -> None:
    for piece, learn in _pieces(message):
        ids = [tokenizer.special(piece.name)] if isinstance(piece, _Special) else tokenizer.encode(piece)
        rendered.ids.extend(ids)
        rendered.mask.extend([learn] * len(ids))


class _Special(NamedTuple):
    name: str


def _pieces(message: Message) -> Iterator[tuple[_Special | str, int]]:
    """A message as specials and texts, each with its mask. A turn's start is given, its end is learned."""
    content = message["content"]
    if message["role"] == "user":
        assert isinstance(content, str)
        yield from ((_Special("<|user_start|>"), 0), (content, 0), (_Special("<|user_end|>"), 0))
        return
    yield _Special("<|assistant_start|>"), 0
    parts: list[Part] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] == "text":
            yield part["text"], 1
        elif part["type"] == "python":
            yield from ((_Special("<|python_start|>"), 1), (part["text"], 1), (_Special("<|python_end|>"), 1))
        else:  # the tool writes this, not the model
            yield from ((_Special("<|output_start|>"), 0), (part["text"], 0), (_Special("<|output_end|>"), 0))
    yield _Special("<|assistant_end|>"), 1


def checked(conversation: Any) -> list[Message]:
    """The messages, a system message merged into the first user's; an error names what is malformed."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("a conversation is a dict with a list of at least one message under 'messages'")
    for i, message in enumerate(messages):
        _check_message(i, message)
    if messages[0]["role"] == "system":
        if len(messages) == 1 or messages[1]["role"] != "user":
            raise ValueError("message 0 is the system's, so message 1 must be the user's")
        merged = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [merged, *messages[2:]]
        offset = 1
    else:
        offset = 0
    for i, message in enumerate(messages):
        due = "assistant" if i % 2 else "user"
        if message["role"] != due:
            raise ValueError(
                f"message {i + offset} has role {message['role']!r} where {due!r} is due: "
                "user and assistant take turns, and the user begins"
            )
    return messages


def _check_message(i: int, message: Any) -> None:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise ValueError(f"message {i} is not a dict with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"message {i} has role {role!r}; there are 'system', 'user' and 'assistant'")
    if isinstance(content, str):
        return
    if role != "assistant":
        raise ValueError(
            f"message {i} ({role}) has content of type {type(content).__name__}; it must be a str"
        )
    if not isinstance(content, list) or not content:
        raise ValueError(f"message {i} (assistant) has content that is neither a str nor a list of parts")
    for j, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "python", "python_output"):
            raise ValueError(
                f"message {i} (assistant), part {j} has type {kind!r}; known are text, python, python_output"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"message {i} (assistant), part {j} ({kind}) has no 'text' that is a str")
