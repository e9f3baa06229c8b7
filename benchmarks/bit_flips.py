"""Single bits flipped in weights, moments and gradients while a tiny model trains: which are named, and what
becomes of a run whose flip is not.

Each trial resumes one checkpoint, trains three steps of two passes, and flips one bit of one tensor: before
the first pass, between the two, or after the second. The seed decides all. `named`: the run said so and went
back; `repaired`: of those, the ones that end as the undisturbed run, bit for bit; `harmless`: not named, and
the end is the same too; `missed`: not named, and the end differs. Then what the checks cost a larger model
(modern, d4, T 512, vocabulary 4,096, 8 rows) if every step is checked.

    uv run python benchmarks/bit_flips.py [--flips 200] [--seed 1] [--share 1e9] [--no-cost] [--json]

`--share` is the part of the time that checking may take: 0.01 in training. The default checks every step.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanochat_core.artifacts.stage import Interrupted, Job, Metrics, Recipe, Runtime
from nanochat_core.data.batch import Batch
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.schedule import Rates, Schedule
from nanochat_core.train import loop
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.setup import new_state

WORLD = World(0, 1, torch.device("cpu"), torch.float32)
BEGIN, STEPS, PASSES, ROWS, V, T = 3, 6, 2, 4, 200, 32
TARGETS = ("weights", "moments", "gradients")


def beginning() -> TrainState:
    config = GPTConfig.of_depth(2, V, sequence_len=T, aspect=16, head_dim=16)
    return new_state(GPT(config).init_weights(1), Rates(weight_decay=0.1), WORLD)


def batches(state: TrainState) -> Iterator[Batch]:
    for number in range(state.drawn, 2 * STEPS):
        idx = torch.randint(0, V, (ROWS, T + 1), generator=torch.Generator().manual_seed(number))
        ones = torch.ones(ROWS, T)
        yield Batch(idx[:, :-1], idx[:, 1:], ones, float(ones.numel()), dict)


def train(folder: Path, state: TrainState, until: int | None = None) -> str:
    """Up to `until`, or to the end; what was said."""

    def stop(state: TrainState) -> Metrics:
        if state.step == until:
            raise Interrupted
        return {}

    runtime = Runtime(base_dir=folder.parent, compile=False, device_batch={"pretrain": ROWS // PASSES})
    job = Job("pretrain", Recipe(), {}, folder, runtime, "f" * 20)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(Interrupted):
        schedule = Schedule(warmup_steps=2)
        loop.fit(job, WORLD, state, batches, steps=STEPS, schedule=schedule, hooks=[loop.Hook(BEGIN, stop)])
    return said.getvalue()


def tensors(state: TrainState, target: str) -> dict[str, Tensor]:
    if target == "moments":
        return state.optimizer.state_dict()
    named = state.model.named_parameters()
    return {name: p.data if target == "weights" else p.grad for name, p in named if p.grad is not None}


def strike(state: TrainState, target: str, rng: random.Random) -> None:
    """Flip a bit at a drawn moment of the run that `state` is about to make."""
    step, moment = rng.randrange(BEGIN, STEPS), rng.randrange(PASSES + 1)
    found = tensors(state, target)
    words = [(tensor, i) for tensor in found.values() for i in (tensor.numel(),)]
    tensor = rng.choices([t for t, _ in words], [n for _, n in words])[0]
    index, bit = rng.randrange(tensor.numel()), rng.randrange(32)
    passes = 0
    loss, broken = state.model.loss, state.optimizer.seals.broken

    def flip_at(now: int) -> None:
        nonlocal moment
        if (state.step, now) == (step, moment):
            moment = -1  # once
            word = tensor.view(-1)[index : index + 1].view(torch.int32)
            word ^= 1 << bit if bit < 31 else -(2**31)

    def passed(*args: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal passes
        flip_at(passes % PASSES)
        passes += 1
        return loss(*args)

    def looked() -> list[str]:
        if passes and passes % PASSES == 0:
            flip_at(PASSES)
        return broken()

    state.model.loss = passed  # type: ignore[method-assign,assignment]
    state.optimizer.seals.broken = looked  # type: ignore[method-assign]


def same(state: TrainState, other: TrainState) -> bool:
    ours, theirs = state.model.state_dict(), other.model.state_dict()
    return all(torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32)) for name in ours)


def trials(folder: Path, flips: int, seed: int) -> dict[str, Counter[str]]:
    reference = beginning()
    train(folder / "reference", reference)
    train(folder / "begun", beginning(), until=BEGIN)
    found = {target: Counter[str]() for target in TARGETS}
    for number in range(flips):
        target = TARGETS[number % len(TARGETS)]
        shutil.copytree(folder / "begun", trial := folder / "trial")
        state = beginning()
        strike(state, target, random.Random(f"{seed}-{number}"))
        named = "going back to the last checkpoint" in train(trial, state)
        shutil.rmtree(trial)
        unchanged = same(state, reference)
        found[target]["flips"] += 1
        if named:
            found[target]["named"] += 1
            found[target]["repaired"] += unchanged
        else:
            found[target]["harmless" if unchanged else "missed"] += 1
    return found


def cost(rounds: int = 10) -> float:
    """The share of a step's processor time that checking it takes, at one pass a step."""
    model = GPT(GPTConfig.of_depth(4, 4096, sequence_len=512)).init_weights(0)
    state = new_state(model, Rates(), WORLD)
    tokens = torch.randint(0, 4096, (8, 513), generator=torch.Generator().manual_seed(0))
    seals = state.optimizer.seals

    def step() -> None:
        state.optimizer.zero_grad()
        total, _ = state.model.loss(tokens[:, :-1], tokens[:, 1:], torch.full((8, 512), 1 / 4096))
        total.backward()  # type: ignore[no-untyped-call]
        state.optimizer.reduce()
        state.optimizer.update(lr=1.0, momentum=0.9, weight_decay=1.0)

    def check() -> None:
        state.optimizer.zero_grad()
        seals.take()
        for name in seals.params:
            seals.look(name)
            seals.added(name)
        assert not seals.broken()

    def seconds(work: Callable[[], None], times: int) -> float:
        found = []
        for _ in range(times + 1):
            begin = time.process_time()
            work()
            found.append(time.process_time() - begin)
        return statistics.median(found[1:])

    return seconds(check, rounds) / seconds(step, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=1e9, help="of the time that checking may take")
    parser.add_argument("--no-cost", action="store_true", help="leave out the larger model")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    loop.CHECK_SHARE = options.share
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = trials(Path(folder), options.flips, options.seed)
    columns = ("flips", "named", "repaired", "harmless", "missed")
    print(f"{'':12}" + "".join(f"{column:>10}" for column in columns))
    for target, counts in found.items():
        print(f"{target:12}" + "".join(f"{counts[column]:10}" for column in columns))
    total: Counter[str] = sum(found.values(), Counter[str]())
    changing = total["flips"] - total["harmless"]
    caught = total["named"] / max(1, changing)
    print(f"named of those that would change the result: {caught:.1%}")
    share = None if options.no_cost else cost()
    if share is not None:
        print(f"checking every step costs {share:.2%} of a step")
    if options.json:
        print(json.dumps({"caught": round(caught, 4), "missed": total["missed"], "cost": share, **total}))


if __name__ == "__main__":
    main()
