"""The server under load: many clients, prompts and answers of mixed lengths, against one request at a time.

    uv run python benchmarks/serve_load.py [--clients 64] [--rows 32] [--json]

Server and clients are two processes on this machine; requests go over a socket, as streams. One at a time
means that each client waits until the one before has its whole answer, as without batching.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import torch
import uvicorn

from nanochat_core.chat.web import Limits, create_app
from nanochat_core.infer.engine import Engine
from nanochat_core.model.gpt import GPT
from nanochat_core.model.shape import GPTConfig
from nanochat_core.tokenizer.bpe import Tokenizer


class Served(NamedTuple):
    """One request as its client saw it."""

    tokens: int
    first: float  # seconds until the first token, from the moment the client wanted to ask
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    with server(args) as url:
        asks = mixed(args.clients)
        asyncio.run(load(url, asks[:2], at_once=1))
        alone, alone_seconds = asyncio.run(load(url, asks, at_once=1))
        together, seconds = asyncio.run(load(url, asks, at_once=len(asks)))
    print(f"d{args.depth}, {args.clients} clients, {args.rows} rows, {args.threads} threads")
    print(f"{'':<16}{'tokens/s':>10}{'first token p50':>18}{'p99':>10}")
    rows = {"one at a time": (alone, alone_seconds), "all together": (together, seconds)}
    numbers: dict[str, Any] = {}
    for name, (served, wall) in rows.items():
        speed = sum(one.tokens for one in served) / wall
        first = statistics.quantiles([one.first for one in served], n=100)
        print(f"{name:<16}{speed:>10,.0f}{first[49]:>16.2f} s{first[98]:>8.2f} s")
        key = name.replace(" ", "_")
        numbers |= {
            f"{key}_tokens_per_s": round(speed, 1),
            f"{key}_first_p50": round(first[49], 3),
            f"{key}_first_p99": round(first[98], 3),
        }
    numbers["ratio"] = round(numbers["all_together_tokens_per_s"] / numbers["one_at_a_time_tokens_per_s"], 3)
    print(f"together {numbers['ratio']:.1f} times as many tokens a second")
    if args.json:
        print(json.dumps({key: value for key, value in vars(args).items() if key != "json"} | numbers))


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """A server in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = spawn.Process(target=serve, args=(args, listening), daemon=True)
        process.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            process.terminate()
            process.join()


def serve(args: argparse.Namespace, listening: socket.socket) -> None:
    """The real application around a random model."""
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer([(i // 256, i % 256) for i in range(args.vocab_size - 256 - 9)])
    config = GPTConfig.of_depth(args.depth, tokenizer.vocab_size, arch="seed", sequence_len=1024)
    model = GPT(config).init_weights(1).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape, generator=generator) / 16)
    model.lm_head.weight[list(tokenizer.specials.values())] = 0  # so that hardly an answer ends early
    engine = Engine(model, tokenizer, max_rows=args.rows, context=1024)
    app = create_app(engine, "bench", limits=Limits(places=args.clients))
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])


def mixed(clients: int) -> list[dict[str, Any]]:
    """What the clients ask: prompts of 8 to 256 tokens, answers of 16 to 128."""
    rng = random.Random(0)
    return [
        {
            "prompt": "".join(rng.choice("abcdefghij ") for _ in range(rng.randint(8, 256))),
            "max_tokens": rng.randint(16, 128),
            "temperature": 0.8,
            "seed": i,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for i in range(clients)
    ]


async def load(url: str, asks: list[dict[str, Any]], *, at_once: int) -> tuple[list[Served], float]:
    """All requests, `at_once` of them at the same time; what each client saw, and the seconds for all."""
    room = asyncio.Semaphore(at_once)
    begin = time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def one(ask: dict[str, Any]) -> Served:
            async with room, client.stream("POST", "/v1/completions", json=ask) as response:
                response.raise_for_status()
                first = 0.0
                tokens = 0
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - begin
                        usage = json.loads(line[6:]).get("usage")
                        tokens = usage["completion_tokens"] if usage else tokens
            return Served(tokens, first, time.perf_counter() - begin)

        served = await asyncio.gather(*(one(ask) for ask in asks))
    return list(served), time.perf_counter() - begin


if __name__ == "__main__":
    main()
