"""Who the model is: a closed set of questions, asked alike in every split.

With downloaded assets the rows are the conversations of identity_conversations.jsonl instead.
"""

import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

from nanochat_core.data.tasks.base import Problem, Rows, Split, contains_answer, dialogue, kept_apart
from nanochat_core.tokenizer.render import checked

FILE = "identity_conversations.jsonl"
OPEN = 500  # conversations: of so many the model does not learn each, so some are kept for validation


class PersonaFact(NamedTuple):
    questions: tuple[str, ...]
    answer: str
    key: str  # what a right answer has to contain


SUBJECTS = (
    PersonaFact(
        ("Who are you?", "What are you?", "What is your name?", "Tell me your name.", "Which model are you?",
         "Introduce yourself.", "Who am I talking to?", "What should I call you?"),
        "I am nanochat, a small language model.",
        "nanochat",
    ),
    PersonaFact(
        ("Who made you?", "Who built you?", "Who trained you?", "Where do you come from?", "Who created you?",
         "Where were you trained?"),
        "I was trained from scratch on your own machine.",
        "your own machine",
    ),
    PersonaFact(
        ("Are you a human?", "Are you a person?", "Are you a robot?", "Are you real?", "Are you an AI?"),
        "I am a language model, not a person.",
        "language model",
    ),
    PersonaFact(
        ("What can you do?", "How can you help me?", "What are you good at?", "What do you know?"),
        "I can chat, spell words, name capitals and work out sums with a calculator.",
        "calculator",
    ),
    PersonaFact(
        ("Are you ChatGPT?", "Are you GPT-4?", "Are you Claude?", "Are you Gemini?"),
        "No, I am nanochat.",
        "nanochat",
    ),
    PersonaFact(
        ("How big are you?", "Are you a big model?", "How smart are you?"),
        "I am very small, so I make mistakes.",
        "small",
    ),
)  # fmt: skip
GREETINGS = ("", "Hi! ", "Hello! ", "Hey, ")


def conversations() -> list[Problem]:
    """Every question with every greeting before it."""
    found = []
    for greeting, subject in itertools.product(GREETINGS, SUBJECTS):
        for question in subject.questions:
            problem = dialogue(greeting + question, subject.answer)
            problem["answer"] = subject.key
            found.append(problem)
    random.Random("identity").shuffle(found)  # so that a short view has some of each
    return found


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    """The rows of the assets' file if there are assets, of the table above if not."""
    listed = conversations() if assets is None else read(assets / FILE)
    if len(listed) >= OPEN:
        listed = kept_apart(listed, split)

    def row(index: int) -> Problem:
        return listed[index % len(listed)]

    return Rows("identity", size if size is not None else len(listed), row, contains_answer)


def mended(content: bytes) -> tuple[bytes, int]:
    """A published file whose conversations all end in an answer, and how many did not: a question that was
    never answered is cut off. Lines that are no conversations stay as they are, to be refused by `read`."""
    lines = []
    cut = 0
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, list) and row and isinstance(row[-1], dict) and row[-1].get("role") == "user":
            cut += 1
            line = json.dumps(row[:-1]).encode() + b"\n" if len(row) > 1 else b""
        lines.append(line)
    return b"".join(lines), cut


def read(path: Path) -> list[Problem]:
    """Lines that are a list of messages, or an object with `messages` and perhaps `answer`."""
    found = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
                problem = Problem(messages=checked(row if isinstance(row, dict) else {"messages": row}))
                if problem["messages"][-1]["role"] != "assistant":
                    raise ValueError("the last message is not the assistant's")
                problem["answer"] = row.get("answer", "nanochat") if isinstance(row, dict) else "nanochat"
                if not isinstance(problem["answer"], str):
                    raise ValueError("'answer' is not a text")
            except ValueError as error:
                why = "not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
                why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else why
                raise ValueError(f"{path}, line {number}: expected a list of messages ({why})") from None
            found.append(problem)
    if not found:
        raise ValueError(f"{path} is empty: expected one conversation a line")
    return found
