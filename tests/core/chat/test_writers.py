"""How an answer looks: typeset on a screen, as it is in a pipe, and the same words in both."""

import io
import re

import pytest
from rich.console import Console

from nanochat_core.chat import writers
from nanochat_core.chat.conversation import AnswerDelta
from nanochat_core.chat.writers import Plain, Typeset, writer

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ANSWER = """# Title

Some **bold** words
and a <b>tag</b>, `code`.

```python
def f():

    return 1
```

1. one
2. two
"""


@pytest.fixture(autouse=True)
def every_piece_is_drawn(monkeypatch) -> None:
    monkeypatch.setattr(writers, "REDRAW", 0)


def screen(height: int = 30) -> Console:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=40, height=height, highlight=False, _environ={}
    )
    return console


def left_standing(output: str) -> list[str]:
    """The lines that a terminal shows in the end: what is erased or gone up over is gone."""
    lines, row = [""], 0
    for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif found := re.fullmatch(r"\x1b\[(\d*)A", token):
            row -= int(found[1] or 1)
        elif token[0] not in "\r\x1b":
            lines[row] += token
    return "\n".join(line.rstrip() for line in lines).rstrip().split("\n")


def shown(pieces: list[AnswerDelta], height: int = 30) -> list[str]:
    console = screen(height)
    page = Typeset(console)
    for piece in pieces:
        page.write(piece)
    page.end()
    return left_standing(console.file.getvalue())


def by_character(text: str) -> list[AnswerDelta]:
    return [AnswerDelta("text", character) for character in text]


def test_markdown_is_typeset_as_it_comes_and_stands_once_in_the_end() -> None:
    lines = shown(by_character(ANSWER))
    assert [line.strip() for line in lines if line.strip()] == [
        "Title",
        "Some bold words",
        "and a <b>tag</b>, code.",
        "def f():",
        "return 1",
        "1 one",
        "2 two",
    ]


def test_the_way_it_was_cut_into_pieces_changes_nothing() -> None:
    assert shown(by_character(ANSWER)) == shown([AnswerDelta("text", ANSWER)])


def test_a_block_that_is_higher_than_the_screen_is_there_in_full_in_the_end() -> None:
    code = "```\n" + "\n".join(f"line {i}" for i in range(50)) + "\n```"
    pieces = [AnswerDelta("text", code[i : i + 9]) for i in range(0, len(code), 9)]
    lines = [line.strip() for line in shown(pieces, height=8)]
    assert [line for line in lines if line] == [f"line {i}" for i in range(50)]


def test_a_call_stands_in_the_sentence() -> None:
    pieces = [AnswerDelta("text", "It is "), AnswerDelta("python", "12*"), AnswerDelta("python", "3")]
    pieces += [AnswerDelta("python_output", "36"), AnswerDelta("text", " so.")]
    assert "It is calculator 12*3 = 36 so." in shown(pieces)
    out = Console(file=io.StringIO())
    plain = Plain(out)
    for piece in [
        *pieces,
        AnswerDelta("python", "1`+1"),
        AnswerDelta("python_output", "2"),
        AnswerDelta("python", "2"),
    ]:
        plain.write(piece)
    plain.end()
    assert out.file.getvalue() == "It is [calculator 12*3 = 36] so.[calculator 1`+1 = 2] [calculator 2]\n"


def test_a_screen_cannot_be_steered_by_an_answer() -> None:
    console = screen()
    page = Typeset(console)
    page.write(AnswerDelta("text", "a\x1b]0;title\x07\x1b[2J\x9b31m [link](file:///etc/passwd)"))
    page.end(" [stopped]")
    output = console.file.getvalue()
    assert "\x1b]" not in output and "\x1b[2J" not in output and "\x9b" not in output
    assert "[stopped]" in ESCAPES.sub("", output)


def test_what_is_not_a_screen_gets_plain_text() -> None:
    assert isinstance(writer(Console(file=io.StringIO())), Plain)
    assert isinstance(
        writer(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})), Plain
    )
    page = writer(screen())
    assert isinstance(page, Typeset)
    page.end()
