"""Which optimizer each parameter gets, and its rates: nanochat's settings, as data.

Rates marked "by width" shrink with (width/768)^-0.5, and all but the smear's and backout's grow with the
square root of the batch.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor, nn

from nanochat_core.model.gpt import GPT
from nanochat_core.optim.adamw import adamw_update
from nanochat_core.optim.schedule import Rates


class Elementwise(Protocol):
    """An update rule that treats every element alike, in place, on a flat stretch (n,) of a parameter.

    `mean` and `square` are its state, zeros at first and kept in checkpoints; `step` counts from 1; `lr` is
    the group's rate times the schedule's multiplier.
    """

    def __call__(
        self,
        p: Tensor,
        grad: Tensor,
        mean: Tensor,
        square: Tensor,
        *,
        step: int,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None: ...


DEFAULT_RATES = Rates()


@dataclass(frozen=True)
class Group:
    """Parameters that share an update rule. Muon's are all of one shape; the others' may differ."""

    kind: Literal["elementwise", "muon", "classic_muon"]
    names: tuple[str, ...]
    params: tuple[nn.Parameter, ...] = field(repr=False)
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-10
    rule: Elementwise = adamw_update  # of the kind `elementwise`


def parameter_groups(model: GPT, rates: Rates = DEFAULT_RATES) -> list[Group]:
    """Every parameter of the model in exactly one group."""
    named = dict(model.named_parameters())
    by_width = (model.config.n_embd / 768) ** -0.5 * rates.scale * rates.stage
    s = rates.scale * rates.stage
    taken: set[str] = set()

    def adamw(
        prefix: str, lr: float, weight_decay: float = 0.0, betas: tuple[float, float] = (0.8, 0.95)
    ) -> Group:
        names = tuple(n for n in named if n.startswith(prefix) and n not in taken)
        taken.update(names)
        return Group("elementwise", names, tuple(named[n] for n in names), lr, weight_decay, betas)

    if model.modern:
        groups = [
            adamw("lm_head", rates.unembedding * by_width, 0.01, (0.8, 0.96)),
            adamw("wte", rates.embedding * by_width, 0.001, (0.8, 0.995)),
            adamw("value_embeds", rates.value_embedding * by_width, 0.01, (0.8, 0.995)),
            adamw("resid_lambdas", 0.005 * s, 0.05),
            adamw("x0_lambdas", 0.5 * s, 0.0, (0.96, 0.95)),  # beta1 above .98 is a cliff
            adamw("smear", 0.2 * rates.stage),  # whatever the batch
            adamw("backout", 0.2 * rates.stage),
        ]
    else:
        groups = [
            adamw("lm_head", rates.unembedding * by_width),
            adamw("wte", rates.embedding * by_width),
        ]
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, p in named.items():
        if name not in taken:
            shapes.setdefault(tuple(p.shape), []).append(name)
    for names in shapes.values():
        params = tuple(named[n] for n in names)
        if model.modern:
            groups.append(
                Group("muon", tuple(names), params, rates.matrix * s, rates.weight_decay, betas=(0.0, 0.9))
            )
        else:
            groups.append(Group("classic_muon", tuple(names), params, rates.matrix * s))
    return [group for group in groups if group.params]
