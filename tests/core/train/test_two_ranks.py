"""Two processes over gloo do what one does: the sharded optimizer, the loop's sums, and a resumed run."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nanochat_core.model.gpt import GPT, GPTConfig
from nanochat_core.optim.groups import parameter_groups
from nanochat_core.optim.optimizer import Optimizer
from nanochat_core.optim.schedule import Rates

STEPS = 3


def train(rank: int, size: int) -> dict[str, Tensor]:
    """A few steps on this rank's half (or all) of a fixed batch."""
    config = GPTConfig.of_depth(3, 200, sequence_len=16, aspect=16, head_dim=16)
    model = GPT(config).init_weights(1)
    rng = torch.Generator().manual_seed(0)
    with (
        torch.no_grad()
    ):  # at their initial values some gradients are nothing but rounding, which Adam makes steps of
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * 0.05)
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
