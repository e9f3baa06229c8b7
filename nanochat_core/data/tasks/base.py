"""What every task is: numbered rows, each a conversation, and a way to tell whether an answer is right."""

import random
import zlib
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, Protocol

from nanochat_core.data.tasks.numbers import marked_number, numbers, plain
from nanochat_core.sources.reasoning import final_answer
from nanochat_core.tokenizer.render import Conversation, Message, Part

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Kind = Literal["categorical", "generative"]

UNBOUNDED = 100_000  # rows of a generator when nobody says how many
TEST_ROWS = 200
HELD_OUT = 50  # of so many rows of a list without splits, one is for validation


class Problem(Conversation, total=False):
    """A conversation that ends in the right answer, with what is needed to mark another one."""

    answer: str  # what the answer has to come to, where the last message does not say it plainly
    tests: str  # of a programming problem
    entry_point: str


class Task(Protocol):
    """Rows to train on and to be asked."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def baseline(self) -> float: ...  # accuracy of a guess
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Problem: ...
    def correct(self, conversation: Problem, answer: str) -> bool: ...
    def reward(self, conversation: Problem, answer: str) -> float: ...


Row = Callable[[int], Problem]
Matches = Callable[[Problem, str], bool]
Loader = Callable[[Split, int | None, Path | None], Task]  # split, rows wanted, assets


def truth(conversation: Conversation) -> str:
    """The text of the last message, without its tool calls."""
    content = conversation["messages"][-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def spoken(answer: str) -> str:
    """What a decoded answer says after its last tool call and its thoughts: a result not put into words does
    not count."""
    return final_answer(answer.rpartition("<|output_end|>")[2])


def same_text(conversation: Problem, answer: str) -> bool:
    wanted = conversation["answer"] if "answer" in conversation else truth(conversation)
    return spoken(answer).strip() == wanted.strip()


def last_number(text: str) -> Fraction | None:
    """The last number in a text, as a number: 10, 10.0 and 1,000 are what they mean."""
    found = list(numbers(plain(text)))
    return found[-1].value if found else None


def same_number(conversation: Problem, answer: str) -> bool:
    """Right if both end in the same number."""
    number = last_number(spoken(answer))
    return number is not None and number == last_number(truth(conversation))


def final_number(conversation: Problem, answer: str) -> bool:
    """Right if both have the same number after `####`."""
    number = marked_number(answer)
    return number is not None and number == marked_number(truth(conversation))


def contains_answer(conversation: Problem, answer: str) -> bool:
    """Right if the words looked for occur, whatever the case."""
    return conversation["answer"].casefold() in answer.casefold()


@dataclass(frozen=True)
class Rows:
    """A task made of a function from an index to a row."""

    name: str
    size: int
    row: Row
    matches: Matches = same_text
    kind: Kind = "generative"
    baseline: float = 0.0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < self.size:
            raise IndexError(f"{self.name} has {self.size} rows; there is no row {index}")
        return self.row(index)

    def __iter__(self) -> Iterator[Problem]:
        return (self.row(index) for index in range(self.size))

    def correct(self, conversation: Problem, answer: str) -> bool:
        return self.matches(conversation, answer)

    def reward(self, conversation: Problem, answer: str) -> float:
        return float(self.matches(conversation, answer))


@dataclass(frozen=True)
class View:
    """Some rows of a task, as a range names them: the first thousand, every second one, all but some."""

    name: str
    task: Task
    rows: range

    @property
    def kind(self) -> Kind:
        return self.task.kind

    @property
    def baseline(self) -> float:
        return self.task.baseline

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Problem:
        if not 0 <= index < len(self.rows):
            raise IndexError(f"{self.name} has {len(self.rows)} rows; there is no row {index}")
        return self.task[self.rows[index]]

    def correct(self, conversation: Problem, answer: str) -> bool:
        return self.task.correct(conversation, answer)

    def reward(self, conversation: Problem, answer: str) -> float:
        return self.task.reward(conversation, answer)


def generator(task: str, split: Split, index: int) -> random.Random:
    """The only source of chance of a generated row."""
    return random.Random(f"{task}-{split}-{index}")


def rows(size: int | None, split: Split) -> int:
    return size if size is not None else UNBOUNDED if split == "train" else TEST_ROWS


def view_size(size: int | None, rows: Sized) -> int:
    """So many of a data set's rows, or all of them."""
    return len(rows) if size is None else min(size, len(rows))


def split_of(*key: str | int) -> Split:
    """The split that a row with this key belongs to, for good: of sixteen one is for the test, and one for
    validation."""
    place = zlib.crc32(" ".join(map(str, key)).encode()) % 16
    return "test" if place == 0 else "validation" if place == 8 else "train"


def kept_apart(listed: list[Problem], split: Split) -> list[Problem]:
    """The rows of a split of a list that has none: every fiftieth, one at least, is for validation and not
    trained on. A test asks about all of it."""
    if split == "test":
        return listed
    held_out = listed[HELD_OUT - 1 :: HELD_OUT] or listed[-1:]
    if split == "validation":
        return held_out
    return (
        [row for i, row in enumerate(listed) if (i + 1) % HELD_OUT]
        if len(listed) >= HELD_OUT
        else listed[:-1]
    )


def dialogue(*turns: str | list[Part]) -> Problem:
    """A conversation of the turns of user and assistant, the user first."""
    messages = [
        Message(role="assistant" if i % 2 else "user", content=content) for i, content in enumerate(turns)
    ]
    return Problem(messages=messages)


def text(words: str) -> Part:
    return Part(type="text", text=words)


def call(expression: str, result: str) -> list[Part]:
    """A call of the calculator and what it said."""
    return [Part(type="python", text=expression), Part(type="python_output", text=result)]


LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")


def multiple_choice(question: str, choices: list[str], right: int) -> Problem:
    """A question with lettered choices; letters follow without a space, as the tokens they are in answers."""
    letters = list(LETTERS[: len(choices)])
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters, strict=True)]
    asked = f"Multiple choice: {question}\n" + "\n".join(lines) + "\n\nAnswer with the letter only."
    problem = dialogue(asked, letters[right])
    problem["letters"] = letters
    return problem
