"""What a server that strangers may reach must do: keep its key, its limits and its silence."""

import hmac
import logging
import socket
import time

import httpx
import pytest
from test_web import metric, until

from nanochat_core.chat import gate
from nanochat_core.chat.web import serve
from nanochat_core.infer.load import Loaded

SECRET = "the-secret-word-of-a-user"
ASK = {"messages": [{"role": "user", "content": "what?"}], "temperature": 0}


def test_the_key_is_compared_in_constant_time(running, monkeypatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    compare_digest = hmac.compare_digest

    def compare(given: bytes, kept: bytes) -> bool:
        compared.append((given, kept))
        return compare_digest(given, kept)

    monkeypatch.setattr(gate.hmac, "compare_digest", compare)
    client = running(token="the key")
    assert client.get("/v1/models").status_code == 200
    refused = client.get("/v1/models", headers={"Authorization": "Bearer the kez"})
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"Authorization": "Basic the key"}).status_code == 401
    assert compared == [(b"the key", b"the key"), (b"the kez", b"the key"), (b"", b"the key")]


def test_a_body_is_bounded_whether_it_says_its_length_or_not(running) -> None:
    client = running(body=10_000)
    big = b'{"messages": "' + b"x" * 20_000
    for content in (big, (big[i : i + 1000] for i in range(0, len(big), 1000))):
        answer = client.post("/v1/chat/completions", content=content)
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"


def test_a_request_that_does_not_arrive_is_given_up(running) -> None:
    client = running(upload=0.2)
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 408")


def test_a_long_conversation_is_bounded(running) -> None:
    client = running(messages=3, chars=100)
    many = {"messages": ASK["messages"] * 4}
    assert "4 messages" in client.post("/v1/chat/completions", json=many).json()["error"]["message"]
    long = {"messages": [{"role": "user", "content": "x" * 101}]}
    assert "101 characters" in client.post("/v1/chat/completions", json=long).json()["error"]["message"]


def test_the_queue_is_bounded(running, slow) -> None:
    client = running(rows=1, places=0)
    body = {"prompt": "Q", "temperature": 0, "max_tokens": 1200, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as first:
        chunks = first.iter_raw()
        next(chunks)
        assert client.post("/v1/completions", json=body).status_code == 429
    until(lambda: metric(client, "nanochat_clients") == 0)


def test_an_answer_has_a_time_limit(running, slow) -> None:
    client = running(rows=1, seconds=0.1)
    start = time.monotonic()
    body = {"prompt": "Q", "temperature": 0, "max_tokens": 1200}  # drawn, it may end at once
    assert client.post("/v1/completions", json=body).status_code == 504
    assert time.monotonic() - start < 5
    until(lambda: metric(client, "nanochat_rows_running") == 0)


def test_what_is_said_is_not_written_down(running, capfd, caplog) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client's own
    client = running(token="the key")
    said = {"messages": [{"role": "user", "content": SECRET}]}
    assert client.post("/v1/chat/completions", json=said).status_code == 200
    assert client.post("/v1/chat/completions", json=said | {"n": 7}).status_code == 400
    assert client.post("/v1/completions", json={"prompt": SECRET, "stop": ""}).status_code == 400
    everything = caplog.text + "".join(capfd.readouterr()) + client.get("/metrics").text
    assert SECRET not in everything and "the key" not in everything


def test_other_sites_get_no_leave_to_read_answers(running) -> None:
    client = running()
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for method in ("OPTIONS", "POST", "GET"):
        answer = client.request(method, "/v1/chat/completions", headers=origin, json=ASK)
        assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_it_listens_on_this_machine_only_unless_told(model, tokenizer, monkeypatch) -> None:
    import uvicorn

    names: list[str] = []

    async def look(self: uvicorn.Server, sockets: list[socket.socket]) -> None:
        names.extend(s.getsockname()[0] for s in sockets)

    monkeypatch.setattr(uvicorn.Server, "serve", look)
    serve(Loaded("tiny", model, tokenizer), port=0, say=lambda _: None)
    assert names == ["127.0.0.1"]


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil"])
def test_a_page_of_another_name_cannot_reach_it(running, name) -> None:
    client: httpx.Client = running()
    assert client.get("/health", headers={"Host": name}).status_code == 421
    assert client.get("/health", headers={"Host": "LOCALHOST:80".lower()}).status_code == 200
