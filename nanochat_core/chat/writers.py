"""How an answer appears while it comes: plain text in a pipe or a file, typeset Markdown on a screen."""

import re
import time
from collections.abc import Iterator
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from nanochat_core.chat.conversation import AnswerDelta, Kind

# What a model writes must not steer the terminal: control characters but newline and tab are shown as U+FFFD.
CONTROL = {code: "\ufffd" for code in (*range(32), 127, *range(128, 160)) if chr(code) not in "\n\t"}
WIDEST = 100  # columns of a line that is pleasant to read
REDRAW = 0.08  # seconds at least between two drawings of what grows
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
FENCE = re.compile(r" {0,3}(```+|~~~+)")


class Writer(Protocol):
    def write(self, piece: AnswerDelta) -> None: ...

    def end(self, note: str = "") -> None: ...


def writer(console: Console) -> Writer:
    """The one that suits where the output goes."""
    screen = console.is_terminal and not console.is_dumb_terminal
    return Typeset(console) if screen else Plain(console)


class Plain:
    """The text as it is, each call as `[calculator 12*3 = 36]`."""

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._kind: Kind = "text"

    def write(self, piece: AnswerDelta) -> None:
        self._say(_mark(self._kind, piece.kind, "[", "]") + piece.text.translate(CONTROL))
        self._kind = piece.kind

    def end(self, note: str = "") -> None:
        self._say(_mark(self._kind, "text", "[", "]") + note + "\n")

    def _say(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


class Typeset:
    """Blocks of Markdown that are finished are printed and stay; only the last one is drawn anew as it grows,
    and of it no more than fits on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._kind: Kind = "text"
        self._text = ""  # of the blocks not yet printed
        self._printed = False
        self._drawn = 0.0
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._live.start()

    def write(self, piece: AnswerDelta) -> None:
        text = piece.text.translate(CONTROL)
        if piece.kind != "text":  # within the backticks of a call
            text = text.replace("`", "'").replace("\n", " ")
        self._text += _mark(self._kind, piece.kind, "`", "`") + text
        self._kind = piece.kind
        *finished, self._text = _blocks(self._text)
        for block in finished:
            self._print(block)
        if time.monotonic() > self._drawn + REDRAW:
            room = max(1, self._console.height - 2)
            self._live.update(_Block(self._text, last=room), refresh=True)
            self._drawn = time.monotonic()

    def end(self, note: str = "") -> None:
        self._live.update("", refresh=True)
        self._live.stop()
        rest = self._text + _mark(self._kind, "text", "`", "`")
        if rest.strip():
            self._print(rest)
        if note:
            self._console.print(note, style="dim", markup=False)

    def _print(self, block: str) -> None:
        if self._printed:
            self._console.print()
        self._console.print(_Block(block))
        self._printed = True


class _Block:
    """Markdown as a chat means it: a line ends where it ends, and a tag is text, not dropped as HTML.

    Without the empty lines that rich puts around some blocks; of the rest the `last` lines, if that is given.
    """

    def __init__(self, text: str, last: int = 0) -> None:
        self._last = last
        self._markdown = Markdown("", hyperlinks=False)
        self._markdown.parsed = PARSER.parse(text)
        for token in self._markdown.parsed:
            for child in token.children or []:
                if child.type == "softbreak":
                    child.type = "hardbreak"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        options = options.update(width=min(console.width, WIDEST))
        lines = console.render_lines(self._markdown, options, pad=False)
        shown = [i for i, line in enumerate(lines) if any(map(_visible, line))]
        lines = lines[shown[0] : shown[-1] + 1] if shown else []
        for line in lines[-self._last :]:
            yield from line
            yield Segment.line()


def _visible(segment: Segment) -> bool:
    return bool(segment.text.strip()) or (segment.style is not None and segment.style.bgcolor is not None)


def _blocks(text: str) -> list[str]:
    """The text cut at empty lines outside of code; the last block may still grow."""
    blocks = list(_cut(text.splitlines(keepends=True)))
    return blocks or [""]


def _cut(lines: list[str]) -> Iterator[str]:
    block, fence = "", ""
    for line in lines:
        found = FENCE.match(line)
        if fence:
            fence = "" if found and found[1].startswith(fence) else fence
        elif found:
            fence = found[1]
        if line.strip() or fence or not line.endswith("\n"):
            block += line
        elif block:
            yield block
            block = ""
    yield block


def _mark(before: Kind, now: Kind, opening: str, closing: str) -> str:
    """What stands between two pieces of different kinds."""
    if before == now:
        return ""
    end = closing if now != "python_output" and before != "text" else ""
    begin = {"python": f"{opening}calculator ", "python_output": " = ", "text": ""}[now]
    return end + (" " if end and begin else "") + begin
