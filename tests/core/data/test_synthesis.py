"""Identity conversations from an endpoint that does what endpoints do: refuse, stumble, repeat, ramble."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nanochat_core.data.tasks.identity import read
from nanochat_core.sources import synthesis
from nanochat_core.sources.persona import PERSONA, prompt
from nanochat_core.sources.synthesis import Order, UnusableAnswer, read_answer, synthesize

Reply = tuple[int, Any, dict[str, str]]


def talk(*contents: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(contents)
        ]
    }


def said(text: Any) -> Reply:
    text = text if isinstance(text, str) else json.dumps(text)
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


class Writer:
    """A fake endpoint: `reply` answers request n, `asked` is what came."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.reply: Callable[[int], Reply] = lambda n: said(
            talk(f"question {n}?", f"I am nanochat, answer {n}.")
        )
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0
        self.url = ""

    def answer(self, path: str, body: dict[str, Any], key: str | None) -> Reply:
        with self.lock:
            self.asked.append((path, body, key))
            n = len(self.asked)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self.reply(n)
        finally:
            with self.lock:
                self.at_once -= 1


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Writer]:
    for name in synthesis.KEYS:
        monkeypatch.delenv(name, raising=False)
    made = Writer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, value, headers = made.answer(self.path, body, self.headers.get("Authorization"))
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            try:
                self.send_response(code)
                for name, text in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(name, text)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the asker was killed

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No test waits; what would have been waited is listed."""
    listed: list[float] = []

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            listed.append(timeout or 0)
            return super().wait(0)

    monkeypatch.setattr(synthesis, "Stop", Event)
    return listed


def order(writer: Writer, count: int, **options: Any) -> Order:
    return Order(writer.url, "big-model", count, **options)


def test_conversations_come_several_at_once_and_are_what_midtraining_reads(
    writer: Writer, tmp_path: Path
) -> None:
    plain = writer.reply

    def slow(n: int) -> Reply:
        time.sleep(0.03)
        return plain(n)

    writer.reply = slow
    out = tmp_path / "mine.jsonl"
    assert synthesize(order(writer, 12, workers=3), out) == 12
    assert writer.most_at_once == 3 and len(writer.asked) == 12
    rows = read(out)
    assert len(rows) == 12 and {row["answer"] for row in rows} == {"nanochat"}
    path, body, key = writer.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "big-model" and key is None
    assert body["response_format"]["json_schema"]["schema"]["required"] == ["messages"]
    assert len({body["messages"][1]["content"] for _, body, _ in writer.asked}) == 12  # each prompt another


def test_prompts_are_the_seeds_and_say_who_the_model_is() -> None:
    assert prompt("Ada", PERSONA, 1, 5) == prompt("Ada", PERSONA, 1, 5) != prompt("Ada", PERSONA, 2, 5)
    asked = prompt("Ada", "{name} likes chess.", 1, 5)[1]["content"]
    assert "Ada likes chess." in asked and "{" not in asked


def test_a_stumbling_endpoint_is_asked_again_and_told_pauses_are_kept(
    writer: Writer, tmp_path: Path, waits: list[float]
) -> None:
    plain = writer.reply
    troubles: dict[int, Reply] = {
        1: (429, {}, {"Retry-After": "17"}),
        2: (500, {}, {}),
        3: (503, b"<html>busy</html>", {}),
    }
    writer.reply = lambda n: troubles.get(n) or plain(n)
    assert synthesize(order(writer, 3, workers=1), tmp_path / "mine.jsonl") == 3
    assert waits[0] == 17 and 2 <= waits[1] <= 4 <= waits[2] <= 8
    assert len(writer.asked) == 6


def test_answers_of_no_use_are_told_and_asked_for_anew(writer: Writer, tmp_path: Path) -> None:
    plain = writer.reply
    bad: dict[int, Reply] = {
        1: said("Sure! Here is your conversation"),
        2: said(talk("question", "")),
        3: said(
            {"messages": [{"role": "assistant", "content": "I begin"}, {"role": "user", "content": "no"}]}
        ),
        4: (200, b"not json", {}),
        5: (200, {"error": "nothing"}, {}),
        6: said(talk("x", "y" * 5000)),
        8: said(talk("Question 7!", "i am nanochat  answer 7")),  # the same as the seventh
    }
    writer.reply = lambda n: bad.get(n) or plain(n)
    notes: list[str] = []
    out = tmp_path / "mine.jsonl"
    synthesize(order(writer, 3, workers=1), out, lambda done, wanted, note: notes.append(note))
    assert [note for note in notes if note] == [
        "no JSON",
        "message 1 is empty",
        "message 0 is not the user's: they take turns, and the user begins",
        "the server's answer is not one of an OpenAI-compatible endpoint",
        "the server's answer is not one of an OpenAI-compatible endpoint",
        "message 1 has 5000 characters, more than 4000",
        "a conversation that is there already",
    ]
    assert len(read(out)) == 3


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"messages": []}',
        '{"messages": "x"}',
        json.dumps(talk("one", "two", "three")),
        json.dumps(talk(*"abcdefghijklmn")),
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}',
        '{"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}]}',
        '["user", "assistant"]',
    ],
)
def test_what_is_no_conversation_is_not_kept(text: str) -> None:
    with pytest.raises(UnusableAnswer):
        read_answer(text)


TALK = talk("hi", "I am {nanochat}, as in [this]")
JSON = json.dumps(TALK)


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        json.dumps(TALK["messages"]),
        json.dumps(TALK, indent=2),
        json.dumps({"conversation": TALK}),
        f"```json\n{JSON}\n```",
        f"```\n{JSON}```",
        f"Sure! Here is the conversation [as asked]:\n\n```json\n{JSON}\n```\n\nI hope {{this}} helps.",
        f"Here it is: {JSON} Anything else?",
        f"<think>They want JSON: {json.dumps(talk('a draft', 'no'))}</think>{JSON}",
        f"They want JSON.\n</think>\n\n{JSON}",
        f"<think>Short.</think>\nHere:\n```json\n{JSON}\n```",
        f"[THINK]Hm, {{}}[/THINK]{JSON}",
        f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{JSON}",
        f"A first try: {json.dumps(talk('one', 'two', 'three'))}. Better: {JSON}",
        f"A draft: {json.dumps(talk('a draft', 'no'))}\nThe final version: {JSON}",
        JSON.replace('"hi"', '"hi\n"'),
        f"\ufeff{JSON}\n",
    ],
)
def test_a_conversation_is_found_after_thoughts_between_prose_and_in_a_fence(text: str) -> None:
    assert read_answer(text) == TALK


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"<think>{JSON}", "thoughts and no answer"),
        ("<think>Hm.</think>", "thoughts and no answer"),
        ("I cannot [do that].", "no JSON"),
        (JSON[:-10], "expected 2 to 12 messages"),
        ("[" * 10_000, "no JSON"),
    ],
)
def test_thoughts_and_halves_are_no_conversation(text: str, why: str) -> None:
    with pytest.raises(UnusableAnswer, match=why):
        read_answer(text)


@pytest.mark.parametrize("field", ["code", "type"])
def test_an_account_without_credit_ends_it_at_once(writer: Writer, tmp_path: Path, field: str) -> None:
    writer.reply = lambda n: (429, {"error": {field: "insufficient_quota", "message": "You exceeded"}}, {})
    with pytest.raises(ValueError, match="HTTP 429: the account has no credit left; add some"):
        synthesize(order(writer, 3, workers=1), tmp_path / "mine.jsonl")
    assert len(writer.asked) == 1


def test_a_model_without_temperature_and_with_parts_is_asked_without(writer: Writer, tmp_path: Path) -> None:
    def reply(n: int) -> Reply:
        if "temperature" in writer.asked[n - 1][1]:
            return 400, {"error": {"message": "Unsupported value: 'temperature' does not support 1.0"}}, {}
        text = json.dumps(talk(f"question {n}?", f"answer {n}"))
        return 200, {"choices": [{"message": {"content": [{"type": "text", "text": text}]}}]}, {}

    writer.reply = reply
    assert synthesize(order(writer, 2, workers=1), tmp_path / "mine.jsonl") == 2
    assert ["temperature" in body for _, body, _ in writer.asked] == [True, False, False]
    assert all("response_format" in body for _, body, _ in writer.asked)


def test_a_key_comes_from_the_environment_and_a_wrong_one_ends_it_at_once(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine.jsonl"
    plain = writer.reply
    right = "Bearer right"
    writer.reply = lambda n: plain(n) if writer.asked[n - 1][2] == right else (401, {}, {})
    with pytest.raises(ValueError, match="HTTP 401: it wants a key: set NANOCHAT_API_KEY"):
        synthesize(order(writer, 2, workers=1), out)
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-and-secret")
    with pytest.raises(ValueError, match="the key in OPENAI_API_KEY is refused") as refused:
        synthesize(order(writer, 2, workers=1), out)
    assert "wrong-and-secret" not in str(refused.value) and len(writer.asked) == 2
    monkeypatch.setenv("NANOCHAT_API_KEY", "right")
    assert synthesize(order(writer, 2, workers=1), out) == 2


def test_a_key_is_not_carried_to_where_somebody_redirects(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    writer.reply = lambda n: (302, {}, {"Location": f"{writer.url}/elsewhere"})
    with pytest.raises(ValueError, match=r"redirects to .*/elsewhere: use that"):
        synthesize(order(writer, 1), tmp_path / "mine.jsonl")
    assert len(writer.asked) == 1


def test_an_endpoint_without_schemas_is_asked_without(writer: Writer, tmp_path: Path) -> None:
    plain = writer.reply
    writer.reply = lambda n: (400, {"error": "response_format"}, {}) if (
        "response_format" in writer.asked[n - 1][1]
    ) else plain(n)  # fmt: skip
    assert synthesize(order(writer, 3, workers=1), tmp_path / "mine.jsonl") == 3
    assert ["response_format" in body for _, body, _ in writer.asked] == [True, False, False, False]


@pytest.mark.parametrize(
    ("reply", "said_so", "asked"),
    [
        ((404, {"error": {"message": "no model big-model"}}, {}), "HTTP 404: check .*no model big-model", 1),
        ((500, {}, {}), "gave no answer in 6 attempts: HTTP 500; the same command goes on", 6),
        (said("no"), "20 answers of big-model in a row could not be used.*no JSON", 20),
        (said(talk("hi", "I am nanochat")), "20 answers .*there already", 21),
    ],
)
def test_what_cannot_succeed_ends_within_its_budget(
    writer: Writer, tmp_path: Path, reply: Reply, said_so: str, asked: int
) -> None:
    writer.reply = lambda n: reply
    with pytest.raises(ValueError, match=said_so):
        synthesize(order(writer, 5, workers=1), tmp_path / "mine.jsonl")
    assert len(writer.asked) == asked


def test_an_endpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:9/v1/chat/completions gave no answer"):
        synthesize(Order("http://127.0.0.1:9/v1", "m", 1, workers=1), tmp_path / "mine.jsonl")
    with pytest.raises(ValueError, match="localhost:1 is no address"):
        Order("localhost:1", "m", 1)


def test_what_is_there_counts_and_a_half_line_goes(writer: Writer, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    synthesize(order(writer, 4), out)
    whole = out.read_bytes()
    out.write_bytes(whole + b'{"messages": [{"role": "us')
    assert synthesize(order(writer, 6), out) == 2
    assert out.read_bytes().startswith(whole) and len(read(out)) == 6 and len(writer.asked) == 6
    assert synthesize(order(writer, 6), out) == 0 and len(writer.asked) == 6
    out.write_text("something else\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 1: expected a conversation"):
        synthesize(order(writer, 7), out)
    assert out.read_text() == "something else\n"


def test_a_last_line_without_its_end_is_kept_if_it_is_a_conversation(writer: Writer, tmp_path: Path) -> None:
    out = tmp_path / "mine.jsonl"
    synthesize(order(writer, 3), out)
    whole = out.read_bytes()
    out.write_bytes(whole.rstrip(b"\n"))  # as an editor may leave it
    assert synthesize(order(writer, 4), out) == 1
    assert out.read_bytes().startswith(whole) and len(read(out)) == 4
    out.write_bytes(whole + b'{"question": "?"}')  # whole, and somebody's: not ours to cut off
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 4: expected a conversation"):
        synthesize(order(writer, 5), out)
    assert out.read_bytes() == whole + b'{"question": "?"}'


COMMAND = """
import sys
from pathlib import Path
from nanochat_core.sources.synthesis import Order, synthesize
synthesize(Order(sys.argv[1], "m", 40, workers=2), Path(sys.argv[2]))
"""


def test_kill_9_leaves_whole_lines_and_the_same_command_goes_on(writer: Writer, tmp_path: Path) -> None:
    plain, out = writer.reply, tmp_path / "mine.jsonl"

    def slow(n: int) -> Reply:
        time.sleep(0.02)
        return plain(n)

    writer.reply = slow
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, writer.url, str(out)], env=dict(os.environ)
    ) as process:
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < 8:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.005)
        with pytest.raises(ValueError, match="another process is appending"):
            synthesize(order(writer, 40), out)
        process.send_signal(signal.SIGKILL)
    before = out.read_bytes()
    had = before.count(b"\n")
    assert 8 <= had < 40 and len(writer.asked) <= had + 2  # only the open requests were lost
    assert synthesize(order(writer, 40), out) == 40 - had
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1]) and len(read(out)) == 40
