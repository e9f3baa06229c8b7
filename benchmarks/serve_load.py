"""The server under load: many clients, prompts and answers of mixed lengths, against one request at a time.

    uv run python benchmarks/serve_load.py [--clients 64] [--rows 32] [--json]

Server and clients are two processes on this machine; requests go over a socket, as streams. The same number
of requests is asked three ways: one at a time, each waiting until the one before has its whole answer, as
without batching; by 16 clients, each of whom asks again when it has its answer; and by all clients at once.
`ratio_16` and `ratio` are the latter two to the first, in tokens per second; the three take turns, and both
are medians over the rounds. Every round asks with other prompts, so that none is known. The model is that of
`decode.py`: random weights, depth 4, a vocabulary of 32,768.
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

from nanochat_core.chat.web import RequestLimits, create_app
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.load import fastest
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
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    ways = {"one at a time": 1, "16 clients": 16, "all at once": args.clients}
    served: dict[str, list[Served]] = {}
    speeds: dict[str, list[float]] = {}
    with server(args) as url:
        asyncio.run(load(url, mixed(2, seed=-1), at_once=1))
        for number in range(args.rounds):
            for way, (name, at_once) in enumerate(ways.items()):
                asks = mixed(args.clients, seed=number * len(ways) + way)
                answers, seconds = asyncio.run(load(url, asks, at_once=at_once))
                served.setdefault(name, []).extend(answers)
                speeds.setdefault(name, []).append(sum(one.tokens for one in answers) / seconds)
    print(f"d{args.depth}, {args.clients} clients, {args.rows} rows, {args.threads} threads")
    print(f"{'':<16}{'tokens/s':>10}{'first token p50':>18}{'p99':>10}")
    numbers: dict[str, Any] = {}
    for name in ways:
        speed = statistics.median(speeds[name])
        first = statistics.quantiles([one.first for one in served[name]], n=100)
        print(f"{name:<16}{speed:>10,.0f}{first[49]:>16.2f} s{first[98]:>8.2f} s")
        key = name.replace(" ", "_")
        numbers |= {
            f"{key}_tokens_per_s": round(speed, 1),
            f"{key}_first_p50": round(first[49], 3),
            f"{key}_first_p99": round(first[98], 3),
        }
    for key, name in (("ratio_16", "16 clients"), ("ratio", "all at once")):
        pairs = zip(speeds[name], speeds["one at a time"], strict=True)
        numbers[key] = round(statistics.median(many / one for many, one in pairs), 3)
    print(f"16 clients {numbers['ratio_16']:.1f}, all at once {numbers['ratio']:.1f} times as many")
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
    model.compute_dtype = fastest(model, torch.device("cpu"))
    engine = Engine(model, tokenizer, max_rows=args.rows, context=1024)
    engine.reserve(1024)
    app = create_app(engine, "bench", limits=RequestLimits(places=args.clients))
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[listening])


def mixed(clients: int, seed: int) -> list[dict[str, Any]]:
    """What the clients ask: prompts of 8 to 256 tokens, answers of 16 to 128."""
    lengths, letters = random.Random(0), random.Random(seed)  # each round: as long, and of other letters
    return [
        {
            "prompt": "".join(letters.choices("abcdefghij ", k=lengths.randint(8, 256))),
            "max_tokens": lengths.randint(16, 128),
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
