"""What a checkpoint costs the training it interrupts: ours, written by a thread, beside torch.save in the
loop.

Blocks of training steps (modern, d4, T 512, vocabulary 4,096, 8 rows) alternate: without a checkpoint, with
ours at the block's beginning (hashed, fsynced and renamed before the block ends), and with torch.save of the
same tensors and an fsync. A checkpoint's cost is what its block takes longer, median over rounds; `share` is
that of a minute, for one checkpoint a minute.

    uv run python benchmarks/checkpoint.py [--steps 12] [--rounds 7] [--threads 2] [--directory DIR] [--json]
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanochat_core.artifacts.stage import Runtime
from nanochat_core.machine.ranks import World, pick_dtype
from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.schedule import Rates
from nanochat_core.train.checkpoint import Saver, TrainState
from nanochat_core.train.setup import new_state

DEPTH, T, V, B = 4, 512, 4096, 8


def train(state: TrainState, tokens: Tensor, steps: int) -> None:
    weights = torch.full((B, T), 1 / (B * T))
    for _ in range(steps):
        state.optimizer.zero_grad()
        total, _ = state.model.loss(tokens[:, :-1], tokens[:, 1:], weights)
        total.backward()  # type: ignore[no-untyped-call]
        state.optimizer.reduce()
        state.optimizer.update(lr=1.0, momentum=0.9, weight_decay=1.0)
        state.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12, help="of a block")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    device = torch.device("cpu")
    world = World(0, 1, device, pick_dtype(Runtime(), device))
    model = GPT(GPTConfig.of_depth(DEPTH, V, sequence_len=T)).init_weights(0)
    state = new_state(model, Rates(), world)
    tokens = torch.randint(0, V, (B, T + 1), generator=torch.Generator().manual_seed(0))

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        saver, plain = Saver(Path(folder), world, keep=2), Path(folder) / "plain.pt"

        def nothing() -> None:
            train(state, tokens, options.steps)

        def ours() -> None:
            saver.save(state)
            train(state, tokens, options.steps)
            saver.wait()

        def torch_save() -> None:
            with plain.open("wb") as f:
                torch.save({"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}, f)
                f.flush()
                os.fsync(f.fileno())
            train(state, tokens, options.steps)

        ways: dict[str, Callable[[], None]] = {"none": nothing, "ours": ours, "torch.save": torch_save}
        train(state, tokens, 2)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begin)
        size = sum(path.stat().st_size for path in saver.found()[0].iterdir())

    base = statistics.median(seconds["none"])
    costs = {
        name: statistics.median([a - b for a, b in zip(seconds[name], seconds["none"], strict=True)])
        for name in ("ours", "torch.save")
    }
    print(f"a checkpoint of {size / 1e6:.0f} MB; {options.steps} steps take {base:.2f} s")
    print(f"{'':12} {'cost, s':>8} {'of a minute':>12}")
    for name, cost in costs.items():
        print(f"{name:12} {cost:8.3f} {cost / 60:12.2%}")
    if options.json:
        summary = {
            "share": costs["ours"] / 60,
            "peer_share": costs["torch.save"] / 60,
            "megabytes": size / 1e6,
        }
        print(json.dumps({key: round(value, 5) for key, value in summary.items()}))


if __name__ == "__main__":
    main()
