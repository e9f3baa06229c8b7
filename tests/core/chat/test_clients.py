"""Clients as people use them: the openai package itself, and the shapes that LangChain-like ones send."""

import asyncio
import re
from typing import TYPE_CHECKING

import httpx
import pytest
from test_web import metric, until

if TYPE_CHECKING:
    import openai

ASK = [{"role": "user", "content": "what?"}]
LONG = {"prompt": "Q", "temperature": 0, "max_tokens": 1200}


def openai_client(http: httpx.Client, key: str = "secret") -> "openai.OpenAI":
    import openai

    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key, max_retries=0, timeout=20)


def test_the_openai_client_talks_lists_and_completes(running) -> None:
    with openai_client(running(token="secret")) as client:
        answer = client.chat.completions.create(model="tiny", messages=ASK, temperature=0, n=1, user="me")
        assert answer.choices[0].message.content == "so ok" and answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "nanochat"
        text = client.completions.create(model="tiny", prompt="Q", temperature=0, max_tokens=11)
        assert (text.choices[0].text, text.choices[0].finish_reason) == ("WERTYQWERTY", "length")


def test_the_openai_client_streams(running) -> None:
    with openai_client(running(token="secret")) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "so ok"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens > 0
        assert len({chunk.id for chunk in chunks}) == 1
        pieces = client.completions.create(
            model="tiny", prompt="Q", temperature=0, max_tokens=5, stream=True, stop="T"
        )
        assert "".join(piece.choices[0].text for piece in pieces) == "WER"


def test_the_openai_client_is_told_why_it_gets_no_answer(running) -> None:
    import openai

    http = running(token="secret", places=0, rows=1)
    with openai_client(http, "wrong") as stranger, pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    with openai_client(http) as client:
        with pytest.raises(openai.BadRequestError) as too_long:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 9000}])
        assert too_long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as too_hot:
            client.chat.completions.create(model="tiny", messages=ASK, temperature=2.5)
        assert too_hot.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as unknown:
            client.chat.completions.create(model="gpt-4", messages=ASK)
        assert unknown.value.code == "model_not_found"


def test_a_hundred_at_once_get_each_their_own_answer(running) -> None:
    import openai

    http = running(rows=8, places=100)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{http.base_url}/v1", api_key="none", max_retries=0, timeout=60
        ) as client:

            async def ask(i: int) -> str:
                answer = await client.completions.create(
                    model="tiny", prompt="QWERTY"[i % 6], temperature=0, max_tokens=3 + i % 7
                )
                return answer.choices[0].text

            return await asyncio.gather(*(ask(i) for i in range(100)))

    for i, answer in enumerate(asyncio.run(all_of_them())):
        assert answer == ("QWERTY" * 4)[i % 6 + 1 :][: 3 + i % 7]
    assert metric(http, 'nanochat_answers_total{finish="length"}') == 100
    assert metric(http, "nanochat_clients") == 0


def test_a_client_that_hangs_up_in_mid_stream_frees_its_row(running, slow) -> None:
    import openai

    http = running(rows=1, places=0)
    with openai_client(http) as client:
        stream = client.completions.create(model="tiny", stream=True, **LONG)
        next(iter(stream))
        assert metric(http, "nanochat_rows_running") == 1
        with pytest.raises(openai.RateLimitError) as busy:
            client.completions.create(model="tiny", **LONG)
        assert busy.value.response.headers["retry-after"] == "1"
        stream.close()
        until(lambda: metric(http, "nanochat_rows_running") == 0)
        assert metric(http, 'nanochat_answers_total{finish="cancelled"}') == 1
        again = client.completions.create(model="tiny", prompt="Q", temperature=0, max_tokens=3)
        assert again.choices[0].text == "WER"


def test_fields_that_other_clients_add_do_no_harm(running) -> None:
    http = running()
    extras = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be kind.", "name": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "what?"}]},
        ],
        "n": 1,
        "stream": False,
        "stream_options": None,
        "stop": None,
        "max_tokens": None,
        "logprobs": False,
        "logit_bias": None,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "metadata": {"run": "1"},
        "store": False,
        "reasoning_effort": "low",
        "temperature": 0,
    }
    answer = http.post("/v1/chat/completions", json=extras).json()
    assert answer["choices"][0]["message"]["content"] == "so ok"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    unused = http.post("/v1/chat/completions", json=extras | {"tools": [tool], "tool_choice": "none"})
    assert unused.status_code == 200
    listed = http.post("/v1/completions", json={"prompt": ["Q"], "temperature": 0, "max_tokens": 3})
    assert listed.json()["choices"][0]["text"] == "WER"


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"functions": [{}]}, "functions"),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format.type"),
        ("chat/completions", {"logprobs": True}, "logprobs"),
        ("chat/completions", {"n": 3}, "n"),
        ("completions", {"prompt": ["a", "b"]}, "prompt"),
        ("completions", {"echo": True}, "echo"),
        ("completions", {"suffix": "end"}, "suffix"),
        ("completions", {"logprobs": 5}, "logprobs"),
        ("completions", {"best_of": 4}, "best_of"),
    ],
)  # fmt: skip
def test_what_would_change_the_kind_of_answer_is_refused_by_name(running, path, asked, param) -> None:
    body = {"messages": ASK} if path.startswith("chat") else {"prompt": "Q"}
    refused = running().post(f"/v1/{path}", json=body | asked)
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["param"].startswith(param)
    assert error["type"] == "invalid_request_error" and re.match(rf"{param}.*: \w", error["message"])
