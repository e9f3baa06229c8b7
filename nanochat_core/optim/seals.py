"""Checksums of what training holds in memory, to tell whether a bit flipped while nobody wrote to it.

Weights and moments are sealed after an update and looked at before the next. A gradient is sealed each time
something was added to it and looked at before the next addition, and before it is used. Not seen: what flips
during an update, and in activations, batches or the processor itself.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's words modulo 2^32, which every flip of one bit changes."""
    return tensor.view(torch.int32).sum(dtype=torch.int32)


class Seals:
    """The checksums of one optimizer's tensors; `on` for the steps in which they are taken."""

    def __init__(self, state: Mapping[str, Tensor], params: Mapping[str, nn.Parameter]) -> None:
        self.state, self.params = state, params
        self.on = False
        self.sums: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.flips: dict[str, list[Tensor]] = {}  # name -> whether its gradient was found changed, each time
        self.nodes = []  # autograd forgets a node's hooks when nobody holds it
        for name, p in params.items():
            p.register_post_accumulate_grad_hook(partial(self.added, name))  # type: ignore[no-untyped-call]
            node = p.view_as(p).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            node.register_prehook(partial(self.look, name))  # type: ignore[union-attr]
            self.nodes.append(node)

    @torch.no_grad()
    def take(self) -> None:
        """Seal weights and moments as they are, and gradients that were set to zero."""
        self.on = True
        self.sums = {name: checksum(tensor) for name, tensor in self.state.items()}

    @torch.no_grad()
    def added(self, name: str, *_: object) -> None:
        """Seal a gradient that something was added to."""
        if self.on:
            self.gradients[name] = checksum(self._gradient(name))

    @torch.no_grad()
    def look(self, name: str, *_: object) -> None:
        """Compare a gradient with its seal, before something is added to it or it is used."""
        if self.on:
            changed = checksum(self._gradient(name)) != self.gradients.get(name, 0)
            self.flips.setdefault(name, []).append(changed)

    def _gradient(self, name: str) -> Tensor:
        grad = self.params[name].grad
        assert grad is not None
        return grad

    @torch.no_grad()
    def broken(self) -> list[str]:
        """The names of tensors that changed since they were sealed; none are sealed then."""
        if not self.on:
            return []
        for name in self.params:
            self.look(name)
        found = {name: checksum(tensor) != self.sums[name] for name, tensor in self.state.items()}
        found |= {f"the gradient of {name}": torch.stack(flips).any() for name, flips in self.flips.items()}
        changed = torch.stack(list(found.values())).tolist()
        self.on = False
        self.gradients, self.flips = {}, {}
        return [name for name, flipped in zip(found, changed, strict=True) if flipped]
