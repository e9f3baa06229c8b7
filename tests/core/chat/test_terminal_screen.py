"""`nanochat chat` as a person has it before them: in a pseudo-terminal, keys in, screen out."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Screen:
    """A process whose terminal is ours."""

    def __init__(self, *words: str, **more: str) -> None:
        self.line, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, b"\x1e\0\x50\0\0\0\0\0")  # 30 lines of 80

        def own_terminal() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat_core.cli.main", *words],
            stdin=side,
            stdout=side,
            stderr=side,
            env=os.environ | {"TERM": "xterm-256color", "OMP_NUM_THREADS": "1"} | more,
            preexec_fn=own_terminal,
        )
        os.close(side)
        self.raw = ""

    def read(self) -> bool:
        """Some more of what it shows; False when there is no more."""
        if not select.select([self.line], [], [], 0.2)[0]:
            return True
        try:
            some = os.read(self.line, 1 << 16)
        except OSError:  # Linux' way to say that the other side is closed
            return False
        self.raw += some.decode(errors="replace")
        return bool(some)

    def until(self, text: str, press: str = "", seconds: float = 60) -> str:
        """What it has shown since the last time, up to this text; a key is pressed until then, as a person
        would (Python's input() does not see a Ctrl-C that comes while it draws)."""
        end = time.monotonic() + seconds
        while text not in (shown := ESCAPES.sub("", self.raw)):
            assert time.monotonic() < end, f"{text!r} is not in {shown!r}"
            if press:
                self.type(press)
                time.sleep(0.5)
            assert self.read(), f"it ended with {shown!r}"
        shown, found, self.raw = shown.partition(text)
        return shown + found

    def type(self, keys: str) -> None:
        os.write(self.line, keys.encode())

    def ended(self) -> int:
        with contextlib.suppress(OSError):
            while self.read() and self.process.poll() is None:
                pass
        return self.process.wait(20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.line)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    with contextlib.ExitStack() as stack:

        def start(*words: str, **env: str) -> Screen:
            screen = Screen(*words, **env)
            stack.callback(screen.close)
            return screen

        yield start


@pytest.fixture
def model_directory(model, trained) -> Path:
    return trained(model)


@pytest.fixture
def endless(parrot, trained, tokenizer) -> Path:
    """A model that says letters for as long as its context lasts, which is long."""
    model = parrot(
        [tokenizer.special("<|assistant_start|>"), *tokenizer.encode("QWERTYQ")], sequence_len=1 << 15
    )
    return trained(model, "mid")


def test_a_conversation_with_all_its_commands(screen, model_directory, endless, tmp_path) -> None:
    chat = screen("chat", str(model_directory), "--temperature", "0", "--max-tokens", "100000")
    chat.until("/help lists the commands")
    chat.type("what?\r")
    answer = chat.until("36 ok")
    assert "[calculator" not in answer and "calculator 12*3 = 36" in answer, "typeset, not plain"
    for command, reply in [
        ("/temperature", "/temperature wants a number, not ''"),
        ("/temperature 0", "> "),
        ("/topk 5.5", "/topk wants a whole number"),
        ("/topk 7", "> "),
        ("/help", "(now 7)"),
        (f"/save {tmp_path / 'talk.json'}", "saved to"),
        ("/clear", "forgotten"),
        (f"/save {tmp_path / 'empty.json'}", "saved to"),
        ("/nonsense", "/nonsense is not a command"),
        ("/model nowhere/x", "there is no directory nowhere/x"),
        (f"/model {endless}", "now talking to mid"),
    ]:
        chat.type(command + "\r")
        chat.until(reply)
    assert [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())["messages"]] == [
        "user",
        "assistant",
    ]
    assert json.loads((tmp_path / "empty.json").read_text()) == {"messages": []}
    chat.type("go on\r")
    chat.until("WERTYQWERTY")
    chat.type("\x03")  # Ctrl-C
    chat.until("[stopped]")
    chat.until("> ")
    chat.type("\x1b[A")  # the line before, from history
    chat.until("go on")
    chat.until("Ctrl-D or /quit leaves", press="\x03")  # at the prompt: it stays
    chat.type("\x04")  # Ctrl-D
    assert chat.ended() == 0


def test_one_prompt_is_typeset_on_a_screen_and_plain_in_a_pipe(screen, model_directory) -> None:
    words = ["chat", str(model_directory), "--temperature", "0"]
    once = screen(*words, "-p", "what?")
    assert "calculator 12*3 = 36 ok" in once.until("ok")
    assert once.ended() == 0
    dumb = screen(*words, "-p", "what?", TERM="dumb")
    assert "so[calculator 12*3 = 36] ok" in dumb.until("ok")
    piped = subprocess.run(
        [sys.executable, "-m", "nanochat_core.cli.main", *words],
        input="what?\n",
        capture_output=True,
        text=True,
    )
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "so[calculator 12*3 = 36] ok\n", "")


def test_ctrl_c_ends_a_single_prompt_with_the_code_of_an_interrupt(screen, endless) -> None:
    once = screen("chat", str(endless), "--temperature", "0", "--max-tokens", "100000", "-p", "go on")
    once.until("WERTYQWERTY")
    once.type("\x03")
    assert once.ended() == 130
