"""Training tokens per second: our seed model, loss and optimizer beside transformers' NanoChat with torch's
AdamW.

The same shape (d4), sequence (512), vocabulary (4,096), batch (8 rows) and tokens; eager and compiled, fp32
and bf16 (the peer's by autocast, ours as the loop has it). Runs alternate, medians are quoted.
`ratio_default` is ours as a CPU user gets it (compiled, bf16 where the CPU has it) over the peer's default,
fp32 eager; `ratio_best` is over the peer's best.

    uv run python benchmarks/train_throughput.py [--steps 8] [--rounds 3] [--threads 2] [--json]
"""

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanochat_core.artifacts.stage import Runtime
from nanochat_core.machine.ranks import pick_dtype
from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.groups import parameter_groups
from nanochat_core.optim.optimizer import Optimizer
from nanochat_core.optim.schedule import Rates

DEPTH, T, V, B = 4, 512, 4096, 8
Step = Callable[[Tensor], tuple[float, float]]
"""One training step on (B, T + 1) tokens: seconds in all, and of these in the optimizer."""


def ours(dtype: torch.dtype, compiled: bool) -> Step:
    model = GPT(GPTConfig.of_depth(DEPTH, V, arch="seed", sequence_len=T)).init_weights(0)
    model.compute_dtype = dtype
    optimizer = Optimizer(parameter_groups(model, Rates()), dtype=dtype)
    loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    weights = torch.full((B, T), 1 / (B * T))

    def step(tokens: Tensor) -> tuple[float, float]:
        begin = time.perf_counter()
        optimizer.zero_grad()
        total, _ = loss(tokens[:, :-1], tokens[:, 1:], weights)
        total.backward()
        middle = time.perf_counter()
        optimizer.reduce()
        optimizer.update(lr=1.0, momentum=0.9, weight_decay=1.0)
        end = time.perf_counter()
        return end - begin, end - middle

    return step


def peer(dtype: torch.dtype, compiled: bool) -> Step:
    from transformers import NanoChatConfig, NanoChatForCausalLM

    c = GPTConfig.of_depth(DEPTH, V, arch="seed", sequence_len=T)
    torch.manual_seed(0)
    model = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=V,
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            max_position_embeddings=T,
            use_cache=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward: Any = torch.compile(model, dynamic=False) if compiled else model

    def step(tokens: Tensor) -> tuple[float, float]:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        cast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with cast:
            logits = forward(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        return end - begin, end - middle

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))

    runs: dict[str, Step] = {}
    for compiled in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{str(dtype).removeprefix('torch.')} {'compiled' if compiled else 'eager'}"
            runs[f"ours {name}"] = ours(dtype, compiled)
            runs[f"peer {name}"] = peer(dtype, compiled)
    for name, step in runs.items():
        begin = time.perf_counter()
        for _ in range(2):
            step(tokens)
        print(f"{name}: ready in {time.perf_counter() - begin:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, step in runs.items():
            for _ in range(options.steps):
                whole, optimizer = step(tokens)
                seconds[name].append(whole)
                shares[name].append(optimizer / whole)
    rate = {name: B * T / statistics.median(s) for name, s in seconds.items()}
    base = rate["peer float32 eager"]
    print(f"\n{'':24} {'tokens/s':>9} {'ratio':>6} {'optimizer':>10}")
    for name in sorted(runs):
        share = statistics.median(shares[name])
        print(f"{name:24} {rate[name]:9,.0f} {rate[name] / base:6.2f} {share:10.1%}")
    default = f"ours {str(pick_dtype(Runtime(), torch.device('cpu'))).removeprefix('torch.')} compiled"
    best_peer = max((name for name in runs if name.startswith("peer")), key=rate.__getitem__)
    summary = {
        "default": default,
        "best_peer": best_peer,
        "ratio_default": round(rate[default] / base, 3),
        "ratio_best": round(rate[default] / rate[best_peer], 3),
        "optimizer_share": round(statistics.median(shares[default]), 4),
    }
    print(", ".join(f"{key} {value}" for key, value in summary.items()))
    if options.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
