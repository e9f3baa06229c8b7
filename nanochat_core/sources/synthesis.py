"""Conversations about who the model is, written by a larger model behind any OpenAI-compatible endpoint.

What comes back is checked before it is kept, and a line is appended whole: whenever this is killed, the same
command goes on.
"""

import contextlib
import itertools
import json
import os
import queue
import random
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from nanochat_core.artifacts.store import locked
from nanochat_core.machine.proxy import opener
from nanochat_core.sources.http import HTTP_TRANSIENT, NETWORK, RetryableError, retry_after
from nanochat_core.sources.persona import PERSONA, prompt
from nanochat_core.sources.reasoning import final_answer
from nanochat_core.tokenizer.render import Conversation

KEYS = ("NANOCHAT_API_KEY", "OPENAI_API_KEY")  # the first that is set is sent
ATTEMPTS = 6  # in a row at one request, before the endpoint counts as gone
Stop = threading.Event  # ends pauses at once
LONGEST_WAIT = 300.0
WASTED = 20  # answers in a row that could not be used, before the model counts as unfit
LONGEST = 4_000  # characters of a message
TURNS = 12  # messages of a conversation
TEMPERATURE = 1.0
DECODER = json.JSONDecoder(strict=False)  # models write line ends into their strings
NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_balance"}

SCHEMA = {
    "type": "object",
    "properties": {
        "messages": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "role": {"type": "string", "enum": ["user", "assistant"]},
                    "content": {"type": "string"},
                },
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["messages"],
    "additionalProperties": False,
}

Tell = Callable[
    [int, int, str], object
]  # conversations there are, wanted, and what was just refused if anything


@dataclass(frozen=True)
class Order:
    """What is wanted of whom."""

    base_url: str  # such as http://127.0.0.1:8080/v1
    model: str
    count: int
    name: str = "nanochat"  # of the model that is to learn it
    persona: str = PERSONA
    seed: int = 42
    workers: int = 4
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"{self.base_url} is no address: write it as http://HOST:PORT/v1")
        if self.count < 1 or self.workers < 1:
            raise ValueError("count and workers are at least 1")
        if not self.persona.strip() or not self.name.strip():
            raise ValueError("the persona and the name say who the model is: neither may be empty")


class UnusableAnswer(Exception):
    """An answer came and is of no use; the message says why."""


def synthesize(order: Order, out: Path, tell: Tell = lambda done, wanted, note: None) -> int:
    """Append conversations to `out` until it holds `count`; how many are new. What was there counts."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out, wait=False) as held:
        if not held:
            raise ValueError(f"another process is appending to {out}; wait for it")
        known = mend(out)
        had = len(known)
        with out.open("ab") as file:
            for conversation in conversations(order, known, tell):
                row = {"messages": conversation["messages"], "answer": order.name}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                tell(len(known), order.count, "")
    return len(known) - had


def mend(out: Path) -> set[str]:
    """The keys of a file's conversations. A last line without its end is given one, or, where a killed
    process left it half written, cut off."""
    known: set[str] = set()
    with out.open("rb+") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            ended = line.endswith(b"\n")
            try:
                if line.strip():
                    row = json.loads(line)
                    known.add(key(row["messages"] if isinstance(row, dict) else row))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                if not ended and isinstance(error, ValueError):  # not JSON, or not all of a character
                    file.truncate(whole)
                    break
                raise ValueError(
                    f"{out}, line {number}: expected a conversation; name a new file, or mend this one"
                ) from None
            if not ended:
                file.seek(0, os.SEEK_END)
                file.write(b"\n")
                break
            whole += len(line)
    return known


def key(messages: Sequence[Mapping[str, Any]]) -> str:
    """What two conversations share that are the same: the first question and answer, however they are set."""
    return "|".join(re.sub(r"\W+", " ", message["content"]).casefold().strip() for message in messages[:2])


def conversations(order: Order, known: set[str], tell: Tell) -> Iterator[Conversation]:
    """New conversations as they come, several requests at a time; `known` grows by each."""
    endpoint = Endpoint(order)
    asked: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: queue.SimpleQueue[Conversation | Exception] = queue.SimpleQueue()

    def work() -> None:
        while True:
            number = asked.get()
            try:
                answers.put(endpoint.conversation(number))
            except Exception as error:
                answers.put(error)

    for _ in range(order.workers):
        threading.Thread(target=work, daemon=True).start()  # so that Ctrl-C need not wait for an answer
    numbers = itertools.count(len(known))
    under_way = wasted = 0
    try:
        while len(known) < order.count:
            while under_way < min(order.workers, order.count - len(known)):
                asked.put(next(numbers))
                under_way += 1
            answer = answers.get()
            under_way -= 1
            if not isinstance(answer, Exception):
                name = key(answer["messages"])
                if name not in known:
                    known.add(name)
                    wasted = 0
                    yield answer
                    continue
                answer = UnusableAnswer("a conversation that is there already")
            if not isinstance(answer, UnusableAnswer):
                raise answer
            wasted += 1
            tell(len(known), order.count, str(answer))
            if wasted == WASTED:
                raise ValueError(
                    f"{WASTED} answers of {order.model} in a row could not be used, the last one because: "
                    f"{answer}; try another model, or a persona that leaves more to say"
                )
    finally:
        endpoint.stop.set()


def read_answer(text: str) -> Conversation:
    """The last conversation in an answer, with prose or fences around it or not; or why there is none."""
    said = final_answer(text)
    why = UnusableAnswer("no JSON" if said.strip() else "thoughts and no answer")
    kept, end = None, 0
    for found in re.finditer(r"[{\[]", said):
        if found.start() < end:
            continue
        try:
            row, end = DECODER.raw_decode(said, found.start())
            kept = as_conversation(row)
        except UnusableAnswer as unusable:
            why = unusable
        except json.JSONDecodeError:
            continue
        except RecursionError:
            break
    if kept is None:
        raise why
    return kept


def as_conversation(row: Any) -> Conversation:
    """Decoded JSON as a conversation, or why it is none."""
    while isinstance(row, dict) and "messages" not in row and len(row) == 1:
        row = next(iter(row.values()))  # {"conversation": {"messages": ...}}
    messages = row.get("messages") if isinstance(row, dict) else row
    if not isinstance(messages, list) or not 2 <= len(messages) <= TURNS or len(messages) % 2:
        raise UnusableAnswer(f"expected 2 to {TURNS} messages, an even number of them")
    for i, message in enumerate(messages):
        role = "assistant" if i % 2 else "user"
        if not isinstance(message, dict) or message.get("role") != role:
            raise UnusableAnswer(f"message {i} is not the {role}'s: they take turns, and the user begins")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise UnusableAnswer(f"message {i} is empty")
        if len(content) > LONGEST:
            raise UnusableAnswer(f"message {i} has {len(content)} characters, more than {LONGEST}")
    return Conversation(messages=[{"role": m["role"], "content": m["content"].strip()} for m in messages])


class Endpoint:
    """The server that answers. It is asked for JSON by schema and at a temperature until it refuses these."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.url = order.base_url.rstrip("/") + "/chat/completions"
        self.name = next((name for name in KEYS if os.environ.get(name)), None)
        self.optional = ["response_format", "temperature"]  # what is asked for until it is refused
        self.stop = Stop()
        self.opener = opener(self.url, _NoRedirect())

    def conversation(self, number: int) -> Conversation:
        """Ask for one conversation until an answer comes."""
        order, jitter = self.order, random.Random(number)
        for failures in itertools.count(1):
            try:
                return read_answer(self.ask(prompt(order.name, order.persona, order.seed, number)))
            except RetryableError as why:
                if failures == ATTEMPTS or self.stop.is_set():
                    raise ValueError(
                        f"{self.url} gave no answer in {failures} attempts: {why}; the same command goes on"
                    ) from None
                pause = why.after if why.after is not None else 2.0**failures * jitter.uniform(0.5, 1.0)
                self.stop.wait(min(LONGEST_WAIT, pause))
        raise AssertionError

    def ask(self, messages: list[dict[str, str]]) -> str:
        """The text of one answer."""
        named = {"name": "conversation", "strict": True, "schema": SCHEMA}
        choices = {
            "response_format": {"type": "json_schema", "json_schema": named},
            "temperature": TEMPERATURE,
        }
        asked = {option: choices[option] for option in tuple(self.optional)}
        body = {"model": self.order.model, "messages": messages, **asked}
        headers = {"Content-Type": "application/json", "User-Agent": "nanochat"}
        if self.name is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.name]}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        try:
            with self.opener.open(request, timeout=self.order.timeout) as answer:
                said = json.loads(answer.read())
            choice = said["choices"][0]
            text = choice["message"]["content"]
            if isinstance(text, list):
                text = "".join(part.get("text", "") for part in text)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                reason = self.refused(error, list(asked))
            raise reason from None
        except NETWORK as error:
            raise RetryableError(str(error) or type(error).__name__) from None
        except (ValueError, KeyError, IndexError, TypeError):
            raise UnusableAnswer("the server's answer is not one of an OpenAI-compatible endpoint") from None
        if not isinstance(text, str) or not text:
            cut = choice.get("finish_reason") == "length"
            raise UnusableAnswer("an empty answer" + (": its tokens were used up by thoughts" if cut else ""))
        return text

    def refused(self, error: urllib.error.HTTPError, asked: list[str]) -> Exception:
        """What an HTTP error means for us, who `asked` for these options."""
        said = " ".join(error.read(2_000).decode(errors="replace").split())
        if error.code == 402 or (error.code == 429 and any(code in said for code in NO_CREDIT)):
            return ValueError(
                f"{self.url} answers HTTP {error.code}: the account has no credit left; add some, and the "
                "same command goes on"
            )
        if error.code in HTTP_TRANSIENT:
            return RetryableError(f"HTTP {error.code}", retry_after(error.headers))
        if error.code in (401, 403):
            key = f"the key in {self.name} is refused" if self.name else f"it wants a key: set {KEYS[0]}"
            return ValueError(f"{self.url} answers HTTP {error.code}: {key}")
        if error.code in (400, 422) and asked:
            # Many local servers know no schemas, reasoning models no temperature. The prompt asks for JSON.
            refused = next((option for option in asked if option in said), asked[0])
            with contextlib.suppress(ValueError):  # another thread has learned it first
                self.optional.remove(refused)
            return RetryableError(f"HTTP {error.code}", 0.0)
        if 300 <= error.code < 400:
            return ValueError(f"{self.url} redirects to {error.headers.get('Location')}: use that --base-url")
        return ValueError(
            f"{self.url} answers HTTP {error.code}: check --base-url and --model {self.order.model} "
            f"({said[:300]})"
        )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is not carried to where somebody redirects."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None
