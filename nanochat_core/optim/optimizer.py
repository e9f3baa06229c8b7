"""Muon and AdamW over all parameters, the state shared out over ranks (ZeRO-2).

Each rank owns a part of every gradient: reduce-scatter brings it the sum, it updates its part, all-gather
spreads the result. With one rank the same lines run without communication. Parameters of a Muon group are
views into one stacked tensor, and their gradients into another, so that nothing is copied to update them as a
batch.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat_core.optim.groups import Group
from nanochat_core.optim.muon import MuonState, muon_update, new_state
from nanochat_core.optim.seals import Seals

REPLICATED_BELOW = 4096  # elements; smaller parameters are updated alike on every rank


def finish(works: "list[dist.Work | None]") -> None:
    """Wait for collectives that were started without waiting."""
    for work in works:
        if work is not None:
            work.wait()


class _Piece(NamedTuple):
    """A stretch of parameters as one contiguous tensor whose first dimension divides by the ranks."""

    group: Group
    name: str
    whole: Tensor  # parameters, (n, ...)
    grads: Tensor  # as `whole`
    used: int  # rows of `whole` that are parameters; the rest pads it
    divides: bool  # among the ranks, if there are several
    sharded: bool  # there are several, and it divides
    state: dict[str, Tensor]


class Optimizer:
    """Updates the parameters of `groups`, whose gradients are sums over all ranks' tokens."""

    def __init__(self, groups: Sequence[Group], *, rank: int = 0, size: int = 1, dtype: torch.dtype) -> None:
        self.rank, self.size, self.dtype = rank, size, dtype
        self.step_count = 0
        self.pieces: list[_Piece] = []
        for group in groups:
            if group.kind == "elementwise":
                for name, p in zip(group.names, group.params, strict=True):
                    self._add_elementwise(group, name, p)
            else:
                self._add_muon(group)
        whole = {piece.name: piece.whole for piece in self.pieces}
        named = {name: p for group in groups for name, p in zip(group.names, group.params, strict=True)}
        self.seals = Seals(whole | self.state_dict(), named)

    def _add_muon(self, group: Group) -> None:
        K, (m, n) = len(group.params), group.params[0].shape
        padded = -(-K // self.size) * self.size
        whole = torch.zeros(padded, m, n, device=group.params[0].device)
        grads = torch.zeros_like(whole)
        for i, p in enumerate(group.params):
            whole[i].copy_(p.data)
            p.data, p.grad = whole[i], grads[i]
        state = new_state(padded // self.size, m, n, whole.device)
        piece = _Piece(group, f"muon_{m}x{n}", whole, grads, K, True, self.size > 1, state._asdict())
        self.pieces.append(piece)

    def _add_elementwise(self, group: Group, name: str, p: torch.nn.Parameter) -> None:
        divides = p.numel() >= REPLICATED_BELOW
        sharded = divides and self.size > 1
        numel = -(-p.numel() // self.size) * self.size if sharded else p.numel()
        whole = torch.zeros(numel, device=p.device)
        grads = torch.zeros_like(whole)
        whole[: p.numel()].copy_(p.data.flatten())
        p.data, p.grad = whole[: p.numel()].view(p.shape), grads[: p.numel()].view(p.shape)
        own = numel // self.size if sharded else numel
        state = {"mean": torch.zeros(own, device=p.device), "square": torch.zeros(own, device=p.device)}
        self.pieces.append(_Piece(group, name, whole, grads, p.numel(), divides, sharded, state))

    def zero_grad(self) -> None:
        for piece in self.pieces:
            piece.grads.zero_()
        self.seals.gradients.clear()

    def _own(self, piece: _Piece, tensor: Tensor) -> Tensor:
        """This rank's part of a piece."""
        if not piece.sharded:
            return tensor
        n = tensor.size(0) // self.size
        return tensor[self.rank * n : (self.rank + 1) * n]

    @torch.no_grad()
    def reduce(self) -> float:
        """Sum the gradients over ranks, each rank keeping its parts; gives the norm of the whole gradient."""
        if self.size > 1:
            works = []
            for piece in self.pieces:
                if piece.sharded:
                    own = self._own(piece, piece.grads)
                    works.append(dist.reduce_scatter_tensor(own, piece.grads, async_op=True))
                else:
                    works.append(dist.all_reduce(piece.grads, async_op=True))
            finish(works)
        squares = torch.zeros(2, device=self.pieces[0].grads.device, dtype=torch.float64)
        for piece in self.pieces:
            squares[int(piece.sharded)] += self._own(piece, piece.grads).norm().double() ** 2
        if self.size > 1:
            dist.all_reduce(squares[1])
        return float(squares.sum().sqrt())

    @torch.no_grad()
    def update(self, *, lr: float, momentum: float, weight_decay: float, grad_scale: float = 1.0) -> None:
        """Apply the reduced gradients; `lr` and `weight_decay` multiply each group's own."""
        self.step_count += 1
        gathers = []
        for piece in self.pieces:
            group = piece.group
            p, grad = self._own(piece, piece.whole), self._own(piece, piece.grads)
            if grad_scale != 1.0:
                grad.mul_(grad_scale)
            if group.kind == "elementwise":
                group.rule(
                    p,
                    grad,
                    piece.state["mean"],
                    piece.state["square"],
                    step=self.step_count,
                    lr=group.lr * lr,
                    betas=group.betas,
                    eps=group.eps,
                    weight_decay=group.weight_decay,
                )
            else:
                muon_update(
                    p,
                    grad,
                    MuonState(**piece.state),
                    modern=group.kind == "muon",
                    lr=group.lr * lr,
                    momentum=momentum,
                    beta2=group.betas[1],
                    weight_decay=group.weight_decay * weight_decay,
                    dtype=self.dtype,
                )
            if piece.sharded:
                gathers.append(dist.all_gather_into_tensor(piece.whole, p, async_op=True))
        finish(gathers)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state, by name; the tensors themselves, not copies."""
        return {f"{piece.name}/{key}": t for piece in self.pieces for key, t in piece.state.items()}

    def load_state_dict(self, parts: Sequence[Callable[[str], Tensor]], step_count: int) -> None:
        """Take this rank's share of a saved state. `parts` give each saving rank's tensors by name; there may
        have been more or fewer ranks than now."""
        for piece in self.pieces:
            for key, own in piece.state.items():
                name = f"{piece.name}/{key}"
                saved = [part(name) for part in (parts if piece.divides else parts[:1])]
                n, m = len(saved[0]), len(own)
                padding = n * len(saved) - piece.used
                if not 0 <= padding < len(saved) or saved[0].shape[1:] != own.shape[1:]:
                    raise ValueError("the optimizer's saved state has another shape than this run's model")
                start = self.rank * m if piece.sharded else 0
                own.zero_()  # what pads the last rank's share
                for r, tensor in enumerate(saved):
                    low, high = max(start, r * n), min(start + m, (r + 1) * n, piece.used)
                    if low < high:
                        own[low - start : high - start].copy_(tensor[low - r * n : high - r * n])
        self.step_count = step_count
        self.seals.on = False
