"""Talking to a model in the terminal, or asking it one thing."""

import contextlib
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from nanochat_core.artifacts.store import write_whole
from nanochat_core.chat.conversation import DEFAULT, AnswerDelta, Detokenizer, fit, parts
from nanochat_core.chat.writers import writer
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.load import Loaded
from nanochat_core.infer.sampling import Sampling
from nanochat_core.tokenizer.render import Message

Load = Callable[[str | None], Loaded]
"""Brings a model by the name the user gave it (None: the one to begin with); ValueError if there is none."""

HELP = """\
/temperature X   how freely it answers: 0 always takes the likeliest word (now {temperature})
/topk N          choose among the N likeliest tokens only; 0 for all (now {top_k})
/model NAME      go on with another model: a stage such as sft, or a directory (now {model})
/clear           forget the conversation
/save FILE       write the conversation as JSON
/help            this list
/quit            leave (or Ctrl-D). Ctrl-C stops an answer."""


def run_terminal(
    load: Load,
    *,
    prompt: str | None = None,
    temperature: float = DEFAULT.temperature,
    top_k: int | None = DEFAULT.top_k,
    max_tokens: int = DEFAULT.max_tokens,
    seed: int | None = None,
) -> None:
    """A conversation; or, with a prompt or with text piped in, one answer and no more."""
    session = Session(load, Sampling(temperature, top_k, 1.0, max_tokens).check(), seed)
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None:
        if not prompt:
            raise ValueError("the prompt is empty; give it a question")
        session.answer(prompt)
        return
    session.console.print(f"{session.loaded.name}. /help lists the commands, Ctrl-D leaves.", style="dim")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    for line in session.lines():
        try:
            if line.startswith("/"):
                if not session.command(line):
                    return
            else:
                session.answer(line, interruptible=True)
        except ValueError as error:
            session.console.print(str(error), style="red", markup=False, highlight=False)


class Session:
    """A conversation with one model at a time."""

    def __init__(self, load: Load, sampling: Sampling, seed: int | None) -> None:
        self._load = load
        self.sampling = sampling
        self._seed = seed
        self.messages: list[Message] = []
        self.console = Console(highlight=False, soft_wrap=True)  # for what the program says
        self.page = Console(highlight=False)  # for what the model says
        self._use(load(None))

    def _use(self, loaded: Loaded) -> None:
        self.loaded = loaded
        context = loaded.model.config.sequence_len
        self._engine = Engine(loaded.model, loaded.tokenizer, max_rows=1, context=context)

    def lines(self) -> Iterator[str]:
        """What the user types, until Ctrl-D."""
        while True:
            try:
                line = input("\n> ").strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:
                self.console.print("\nCtrl-D or /quit leaves", style="dim")
                continue
            if line:
                yield line

    def answer(self, text: str, *, interruptible: bool = False) -> None:
        """Say something to the model and print its answer as it comes."""
        tokenizer = self.loaded.tokenizer
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        prompt = fit(tokenizer, messages, self._engine.context, self.sampling.max_tokens)
        seed = secrets.randbits(32) if self._seed is None else self._seed + len(messages)
        pieces: list[AnswerDelta] = []
        page = writer(self.page)
        note = ""
        with contextlib.closing(self._engine.stream(prompt, self.sampling._replace(seed=seed))) as stream:
            try:
                for piece in _read(Detokenizer(tokenizer), stream):
                    page.write(piece)
                    pieces.append(piece)
            except KeyboardInterrupt:
                if not interruptible:
                    raise
                note = " [stopped]"
            finally:
                page.end(note)
        self.messages = [*messages, {"role": "assistant", "content": parts(pieces)}]

    def command(self, line: str) -> bool:
        """Obey a /command; False to leave."""
        name, _, value = line.partition(" ")
        value = value.strip()
        match name:
            case "/quit" | "/exit":
                return False
            case "/help":
                now = self.sampling._asdict() | {"model": self.loaded.name}
                self.console.print(HELP.format(**now), markup=False)
            case "/clear":
                self.messages = []
                self.console.print("forgotten", style="dim")
            case "/temperature":
                self.sampling = self.sampling._replace(temperature=_number(name, value)).check()
            case "/topk":
                self.sampling = self.sampling._replace(top_k=_whole(name, value) or None).check()
            case "/model":
                self._use(self._load(value or None))
                self.console.print(f"now talking to {self.loaded.name}", style="dim", markup=False)
            case "/save":
                self._save(value)
            case _:
                raise ValueError(f"{name} is not a command; /help lists them")
        return True

    def _save(self, file: str) -> None:
        if not file:
            raise ValueError("/save wants a file name: /save talk.json")
        path = Path(file).expanduser()
        try:
            write_whole(path, json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from None
        self.console.print(f"saved to {path}", style="dim", markup=False)


def _read(reader: Detokenizer, tokens: Iterator[int]) -> Iterator[AnswerDelta]:
    for token in tokens:
        yield from reader.read(token)
    yield from reader.end()


def _whole(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{name} wants a whole number, not {value!r}")
    return int(value)


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name} wants a number, not {value!r}") from None
