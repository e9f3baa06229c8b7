"""The server over a real socket: OpenAI's shapes, its limits, and clients that leave."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn

from nanochat_core.chat.page import PAGE
from nanochat_core.chat.web import serve
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.load import Loaded

LONG = {"role": "user", "content": "go on"}
CALL = {"type": "python", "text": "1"}
ASK = {"messages": [{"role": "user", "content": "what?"}], "temperature": 0}


def events(response: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def metric(client: httpx.Client, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_answer_has_openais_shape_with_the_tool_call_beside_it(running) -> None:
    client = running()
    answer = client.post("/v1/chat/completions", json=ASK | {"model": "tiny"}).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion" and answer["model"] == "tiny"
    assert choice["message"]["content"] == "so ok" and choice["finish_reason"] == "stop"
    assert choice["message"]["nanochat"][1:3] == [
        {"type": "python", "text": "12*3"},
        {"type": "python_output", "text": "36"},
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    again = [{"role": "assistant", "content": choice["message"]["nanochat"]}, LONG]
    more = client.post("/v1/chat/completions", json={"messages": ASK["messages"] + again, "temperature": 0})
    assert more.json()["choices"][0]["message"]["content"] == "so ok"


def test_a_stream_says_the_same_piece_by_piece(running) -> None:
    client = running()
    asked = ASK | {"stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=asked) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "so ok"
    calls = [delta["nanochat"] for delta in deltas if "nanochat" in delta]
    assert "".join(call["text"] for call in calls if call["type"] == "python_output") == "36"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0


def test_a_fast_model_is_told_of_in_fewer_events_than_tokens_and_in_the_same_words(running) -> None:
    client = running()
    asked = {"prompt": "Q", "temperature": 0, "max_tokens": 100}
    whole = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
    with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as response:
        texts = [chunk["choices"][0]["text"] for chunk in events(response) if chunk["choices"]]
    assert "".join(texts) == whole
    assert len(whole) == 100 and len(texts) < 50


def test_plain_completions_continue_a_text_until_a_stop_or_the_limit(running) -> None:
    client = running()

    def complete(**more: object) -> tuple[str, str]:
        answer = client.post(
            "/v1/completions", json={"prompt": "Q", "temperature": 0, "max_tokens": 11} | more
        )
        choice = answer.json()["choices"][0]
        return choice["text"], choice["finish_reason"]

    assert complete() == ("WERTYQWERTY", "length")
    assert complete(stop="YQ") == ("WERT", "stop")
    assert complete(stop=["nothing", "QWX", "TYQWE"]) == ("WER", "stop")
    assert complete(stop="YQX") == ("WERTYQWERTY", "length")
    body = {"prompt": "Q", "temperature": 0, "stream": True, "stop": "YQ"}
    with client.stream("POST", "/v1/completions", json=body) as r:
        assert "".join(chunk["choices"][0]["text"] for chunk in events(r)) == "WERT"


def test_many_at_once_share_the_engine_and_each_gets_its_own(running) -> None:
    client = running(rows=8, places=100)

    def ask(i: int) -> str:
        body = {"prompt": "QWERTY"[i % 6], "temperature": 0, "max_tokens": 5 + i % 7, "seed": i}
        return client.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    for i, answer in enumerate(answers):
        assert answer == ("QWERTY" * 4)[i % 6 + 1 :][: 5 + i % 7]
    assert metric(client, 'nanochat_answers_total{finish="length"}') == 40


def test_a_full_server_says_so_and_a_client_that_leaves_makes_room(running, slow) -> None:
    client = running(rows=1, places=1)
    body = {"prompt": "Q", "temperature": 0, "max_tokens": 1200, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as first:
        chunks = first.iter_raw()
        next(chunks)
        second = threading.Thread(
            target=client.post, args=("/v1/completions",), kwargs={"json": body | {"max_tokens": 2}}
        )
        second.start()
        until(lambda: metric(client, "nanochat_clients") == 2)
        third = client.post("/v1/completions", json=body)
        assert third.status_code == 429 and third.headers["retry-after"]
        assert third.json()["error"]["code"] == "busy"
    second.join()
    until(lambda: metric(client, "nanochat_clients") == 0 and metric(client, "nanochat_rows_running") == 0)
    assert metric(client, 'nanochat_answers_total{finish="cancelled"}') == 1


def test_a_client_that_leaves_before_its_whole_answer_makes_room_too(running, slow) -> None:
    client = running(rows=1)
    body = {"prompt": "Q", "temperature": 0, "max_tokens": 1200}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=0.2)
    until(lambda: metric(client, "nanochat_rows_running") == 0)
    assert metric(client, 'nanochat_answers_total{finish="cancelled"}') == 1


def test_an_answer_that_takes_too_long_is_ended(running, slow) -> None:
    client = running(rows=1, seconds=0.1)
    body = {"prompt": "Q", "temperature": 0, "max_tokens": 1200}
    assert client.post("/v1/completions", json=body).status_code == 504
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert events(response)[-1]["error"]["code"] == "timeout"
    until(lambda: metric(client, "nanochat_rows_running") == 0)


REFUSED = [
    ("chat/completions", {}, 400, "messages"),
    ("chat/completions", {"messages": []}, 400, "messages"),
    ("chat/completions", ASK | {"temperature": 3}, 400, "temperature"),
    ("chat/completions", ASK | {"max_tokens": 0}, 400, "max_tokens"),
    ("chat/completions", ASK | {"n": 2}, 400, "n:"),
    ("chat/completions", ASK | {"stop": ""}, 400, "stop"),
    ("chat/completions", ASK | {"model": "gpt-4"}, 404, "no model 'gpt-4'"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
    ("chat/completions", {"messages": [{"role": "system", "content": "x"}]}, 400, "last message"),
    ("chat/completions", {"messages": [LONG, {"role": "user", "content": [CALL]}]}, 400, "parts"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "too long"),
    ("chat/completions", {"messages": [LONG] * 501}, 400, "501 messages"),
    ("completions", {"prompt": "x" * 2000}, 400, "2001 tokens"),
    ("completions", {"prompt": "x" * 300_000}, 400, "characters"),
    ("completions", {"prompt": "x" * (1 << 20)}, 413, "bytes"),
]  # fmt: skip


def test_what_cannot_be_answered_is_refused_in_one_sentence(running) -> None:
    client = running()
    for path, body, status, says in REFUSED:
        answer = client.post(f"/v1/{path}", json=body)
        assert answer.status_code == status, says
        assert says in answer.json()["error"]["message"]


def test_malformed_requests_are_never_the_servers_fault(running) -> None:
    client = running()
    headers = {"Content-Type": "application/json"}
    for content in (
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff",
    ):
        assert client.post("/v1/chat/completions", content=content, headers=headers).status_code == 400
    assert (
        client.post(
            "/v1/completions", content=b'{"prompt": "Q", "temperature": NaN}', headers=headers
        ).status_code
        == 400
    )
    chunks = (b"x" * 65536 for _ in range(40))
    assert client.post("/v1/completions", content=chunks, headers=headers).status_code in (400, 413)
    assert client.get("/v1/completions").status_code == 405
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"


def test_other_sites_cannot_use_the_server(running) -> None:
    client = running()
    plain = client.post(
        "/v1/chat/completions", content=json.dumps(ASK), headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code >= 400  # what a form or a simple cross-site request could send
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 421
    options = client.options("/v1/chat/completions", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in options.headers


def test_a_key_is_asked_for_if_one_is_set(running) -> None:
    client = running(token="secret")
    for wrong in ("", "Bearer", "Bearer wrong", "sécret".encode()):
        for path in ("/v1/models", "/metrics"):
            refused = client.get(path, headers={"Authorization": wrong})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/health").json() == {"status": "ok", "model": "tiny", "key": True}
    assert client.get("/").status_code == 200


def test_models_and_the_page_are_there(running) -> None:
    client = running()
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == "tiny" and card == client.get("/v1/models/tiny").json()
    assert client.get("/v1/models/other").status_code == 404
    page = client.get("/")
    assert "<title>tiny" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_the_page_never_turns_text_into_markup_and_loads_nothing() -> None:
    html = PAGE.read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "srcdoc",
        " style=",
    ):
        assert word not in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)


def test_an_engine_that_fails_says_so_and_serves_no_more(running, monkeypatch) -> None:
    client = running()
    monkeypatch.setattr(Engine, "step", lambda _: 1 / 0)
    failed = client.post("/v1/chat/completions", json=ASK)
    assert failed.status_code == 503 and "ZeroDivisionError" in failed.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=ASK).status_code == 503
    assert client.get("/health").status_code == 503


def test_a_port_that_is_taken_is_one_clear_line(model, tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError, match="cannot listen on"):
        serve(Loaded("tiny", model, tokenizer), port=taken.getsockname()[1])


def test_serving_ends_with_ctrl_c_and_says_where_it_is(model, tokenizer, monkeypatch) -> None:
    said: list[str] = []

    async def interrupted(self, sockets) -> None:
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "serve", interrupted)
    serve(Loaded("tiny", model, tokenizer), port=0, say=said.append)
    assert re.fullmatch(r"tiny is at http://127.0.0.1:\d+  \(Ctrl-C ends it\)", said[0]) and len(said) == 1
    serve(Loaded("tiny", model, tokenizer), host="0.0.0.0", port=0, say=said.append)
    assert "--token" in said[-1]
