"""A base_dir with a real tokenizer and a tiny model in it, as the stages leave them."""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import save_file

from nanochat_core.chat.gate import RequestLimits
from nanochat_core.chat.web import about, create_app
from nanochat_core.infer.engine import Engine
from nanochat_core.model.gpt import GPT, write_config
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer, train

SHAPE = GPTConfig("seed", sequence_len=128, vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=256)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(["the quick brown fox jumps over the lazy dog, and the dog does not mind"], 290)


@pytest.fixture
def trained(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Leave a model behind as `sft` would; the directory."""

    def trained(model: GPT, stage: str = "sft") -> Path:
        tokenizer.save(tmp_path / "tokenizer" / "t0")
        path = tmp_path / stage / "s0"
        path.mkdir(parents=True)
        write_config(path, model.config, tokenizer.fingerprint)
        save_file(model.state_dict(), path / "model.safetensors")
        inputs = {"tokenizer": {"stage": "tokenizer", "fingerprint": "t0"}}
        (path / "job.json").write_text(json.dumps({"inputs": inputs}))
        return path

    return trained


@pytest.fixture
def random_model(tokenizer: Tokenizer) -> Callable[[str], GPT]:
    def build(arch: str) -> GPT:
        model = GPT(replace(SHAPE, arch=arch, vocab_size=tokenizer.vocab_size)).init_weights(1)
        rng = torch.Generator().manual_seed(2)
        for weight in model.eval().requires_grad_(False).parameters():
            weight.add_(torch.randn(weight.shape, generator=rng) / 16)
        return model

    return build


@pytest.fixture
def parrot(tokenizer: Tokenizer) -> Callable[..., GPT]:
    """A model that has learned nothing but which token comes after which: chains of tokens, said greedily."""

    def parrot(*chains: list[int], **shape: int) -> GPT:
        config = replace(SHAPE, vocab_size=tokenizer.vocab_size, **shape)
        model = GPT(config).init_weights(1).eval().requires_grad_(False)  # blocks that add nothing
        for chain in chains:
            for token, following in itertools.pairwise(chain):
                model.lm_head.weight[following] += model.wte.weight[token]
        return model

    return parrot


@pytest.fixture
def model(parrot, tokenizer):
    """Answers `so 12*3 36 ok` in a chat, and after the letter Q letters without end."""
    special, encode = tokenizer.special, tokenizer.encode
    call = [special("<|python_start|>"), *encode("12*3"), special("<|python_end|>")]
    return parrot(
        [special("<|assistant_start|>"), *encode("so"), *call],
        [special("<|output_end|>"), *encode(" ok"), special("<|assistant_end|>")],
        encode("QWERTYQ"),
    )


@pytest.fixture
def slow(monkeypatch) -> None:
    """Ten seconds for 1,200 tokens, so that there is time to leave."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.008) or step(engine))


@pytest.fixture
def running(model, tokenizer) -> Iterator[Callable[..., httpx.Client]]:
    """Starts a server on a free port; gives a client of it."""
    with contextlib.ExitStack() as stack:

        def run(
            *,
            rows: int = 4,
            context: int = 1280,
            token: str | None = None,
            of: GPT | None = None,
            **limits: float,
        ) -> httpx.Client:
            engine = Engine(of or model, tokenizer, max_rows=rows, context=context)
            app = create_app(engine, "tiny", token=token, limits=RequestLimits(**limits), facts=about(model))
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            stack.callback(thread.join)
            stack.callback(lambda: setattr(server, "should_exit", True))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return stack.enter_context(httpx.Client(base_url=url, headers=headers, timeout=20))

        yield run
