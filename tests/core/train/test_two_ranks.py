"""Several processes over gloo do what one does: the sharded optimizer, the loop's sums, a run resumed by
another number of them."""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tinytrain import WORLD, job_in
from torch import Tensor

from nanochat_core.artifacts.stage import Interrupted, Metrics
from nanochat_core.data.batch import Batch
from nanochat_core.machine.ranks import World
from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.groups import parameter_groups
from nanochat_core.optim.optimizer import Optimizer
from nanochat_core.optim.schedule import Rates, Schedule
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.loop import Hook, fit
from nanochat_core.train.setup import new_state

STEPS = 3


def perturbed(rng: torch.Generator) -> GPT:
    """At their initial values some gradients are nothing but rounding, which Adam makes steps of."""
    model = GPT(GPTConfig.of_depth(3, 200, sequence_len=16, aspect=16, head_dim=16)).init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
    return model


def train(rank: int, size: int) -> dict[str, Tensor]:
    """A few steps on this rank's half (or all) of a fixed batch."""
    rng = torch.Generator().manual_seed(0)
    model = perturbed(rng)
    optimizer = Optimizer(
        parameter_groups(model, Rates(weight_decay=0.1)), rank=rank, size=size, dtype=torch.float32
    )
    for _ in range(STEPS):
        idx = torch.randint(0, 200, (4, 17), generator=rng)[rank::size]
        optimizer.zero_grad()
        total, _ = model.loss(idx[:, :-1], idx[:, 1:], torch.full((len(idx), 16), 1 / 64))
        total.backward()  # type: ignore[no-untyped-call]
        norm = optimizer.reduce()
        optimizer.update(lr=1.0, momentum=0.9, weight_decay=1.0, grad_scale=min(1.0, 0.5 / norm))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def in_a_process(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    torch.save(train(rank, size), f"{folder}/rank_{rank}.pt")
    dist.destroy_process_group()


def test_the_sharded_optimizer_equals_one_rank(tmp_path: Path) -> None:
    other = mp.get_context("spawn").Process(target=in_a_process, args=(1, 2, str(tmp_path)))
    other.start()
    in_a_process(0, 2, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    alone = train(0, 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        for name, tensor in alone.items():
            # AdamW's first steps are the gradient's sign: where it is all but zero, another order of adding
            # flips it.
            close = torch.isclose(found[name], tensor, atol=2e-5, rtol=1e-3).float().mean()
            assert close > 0.998, (name, float(close))


def test_a_state_divided_among_other_ranks_and_back_is_the_same_bits() -> None:
    def optimizers(size: int) -> list[Optimizer]:
        groups = [parameter_groups(perturbed(torch.Generator()), Rates()) for _ in range(size)]
        return [Optimizer(groups[r], rank=r, size=size, dtype=torch.float32) for r in range(size)]

    (alone,) = optimizers(1)
    for tensor in alone.state_dict().values():
        tensor.normal_()
    ranks = [alone]
    for size in (2, 3, 2, 1):
        parts = [rank.state_dict().__getitem__ for rank in ranks]
        ranks = optimizers(size)
        for rank in ranks:
            rank.load_state_dict(parts, 7)
    assert ranks[0].step_count == 7
    for name, tensor in alone.state_dict().items():
        assert torch.equal(ranks[0].state_dict()[name], tensor), name


def go_on(rank: int, size: int, folder: Path, until: int) -> None:
    """Train eight steps, or up to one of them, from the folder's checkpoint if it has one; each rank on its
    rows of the same batches."""
    world = World(rank, size, WORLD.device, WORLD.dtype)

    def batches(state: TrainState) -> Iterator[Batch]:
        for step in range(state.step, 8):
            idx = torch.randint(0, 200, (6, 17), generator=torch.Generator().manual_seed(step))[rank::size]
            ones = torch.ones(len(idx), 16)
            yield Batch(idx[:, :-1], idx[:, 1:], ones, float(ones.numel()), dict)

    def stop(state: TrainState) -> Metrics:
        if state.step == until:
            raise Interrupted
        return {}

    state = new_state(perturbed(torch.Generator().manual_seed(0)), Rates(weight_decay=0.1), world)
    with contextlib.suppress(Interrupted):
        fit(
            job_in(folder), world, state, batches,
            steps=8, schedule=Schedule(warmup_steps=2), hooks=[Hook(4, stop)],
        )  # fmt: skip


def every_change_of_ranks(process: int, folder: Path, barrier: Barrier) -> None:
    """Up to step 4 on each number of ranks, and to the end on each."""
    torch.set_num_threads(1)

    def together(size: int, where: Path, until: int) -> None:
        barrier.wait()
        if process < size:
            meet = f"file://{where}.meet"
            dist.init_process_group("gloo", init_method=meet, rank=process, world_size=size)
            go_on(process, size, where, until)
            dist.destroy_process_group()
        barrier.wait()

    for before in (1, 2, 3):
        together(before, begun := folder / f"{before}", 4)
        for after in (1, 2, 3):
            where = folder / f"{before}-{after}"
            if process == 0:
                shutil.copytree(begun, where)
            together(after, where, -1)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_ranks_with_the_same_losses(tmp_path: Path) -> None:
    """Up to rounding, for the order of additions is another; on one rank again, bit for bit."""
    barrier = mp.get_context("spawn").Barrier(3)
    mp.spawn(every_change_of_ranks, (tmp_path, barrier), nprocs=3)  # type: ignore[no-untyped-call]
    go_on(0, 1, tmp_path / "alone", -1)
    alone = losses(tmp_path / "alone")
    for before, after in itertools.product((1, 2, 3), repeat=2):
        assert losses(tmp_path / f"{before}-{after}") == pytest.approx(alone, rel=1e-4), (before, after)
    assert losses(tmp_path / "1-1") == alone
