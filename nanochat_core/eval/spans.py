"""Likelihoods of spans of text: sequences batched by length, only scored positions sent through the head."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nanochat_core.model import attention
from nanochat_core.model.gpt import GPT, After

BATCH_TOKENS = 16_384  # of a forward pass, padding included
WORTH_SHARING = 16  # tokens of a common beginning; two passes for fewer take longer than one


class Candidate(NamedTuple):
    """Tokens of which those at start..end-1 are scored."""

    tokens: list[int]
    start: int
    end: int


class Logits(Protocol):
    """Any other model: (B, T) tokens, and of which rows and positions (N,) the logits (N, V) are wanted."""

    def __call__(self, idx: Tensor, rows: Tensor, positions: Tensor) -> Tensor: ...


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({s[i] for s in sequences}) > 1), shortest)


class Span(NamedTuple):
    """What the model made of a candidate's span."""

    loss: float  # mean, in nats
    exact: bool  # every token was the likeliest


@torch.no_grad()
def score(
    model: GPT | Logits,
    groups: Sequence[Sequence[Candidate]],
    *,
    device: torch.device | str,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[Span]]:
    """Score the candidates of many examples, in batches of similar length.

    A GPT of ours reads once what the candidates of an example begin with; another model reads everything.
    """
    found: dict[int, list[Span]] = {}
    for batch in buckets(groups, batch_tokens):
        chosen = [groups[i] for i in batch]
        spans = iter(_ours(model, chosen, device) if isinstance(model, GPT) else _any(model, chosen, device))
        for i in batch:
            found[i] = [next(spans) for _ in groups[i]]
    return [found[i] for i in range(len(groups))]


def buckets(groups: Sequence[Sequence[Candidate]], batch_tokens: int) -> Iterator[list[int]]:
    """Examples of similar length, as many as fit into a pass; longest first: too big shows at once."""

    def longest(i: int) -> int:
        return max(len(candidate.tokens) for candidate in groups[i])

    batch: list[int] = []
    rows = 0
    for i in sorted(range(len(groups)), key=longest, reverse=True):
        if batch and (rows + len(groups[i])) * longest(batch[0]) > batch_tokens:
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += len(groups[i])
    if batch:
        yield batch


def _padded(rows: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """(B, T), zeros on the right: harmless, as attention is causal."""
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        idx[row, : len(tokens)] = torch.tensor(tokens)
    return idx.to(device)


def _scored(candidates: Sequence[Candidate], skipped: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) row, position whose logits are wanted (counted from what is skipped of the row), and target."""
    rows = [r for r, c in enumerate(candidates) for _ in range(c.start, c.end)]
    positions = [
        i - 1 - skip for c, skip in zip(candidates, skipped, strict=True) for i in range(c.start, c.end)
    ]
    targets = [token for c in candidates for token in c.tokens[c.start : c.end]]
    return torch.tensor(rows), torch.tensor(positions), torch.tensor(targets)


def _spans(logits: Tensor, rows: Tensor, targets: Tensor, count: int) -> list[Span]:
    """(N, V) logits -> one span for each of `count` rows."""
    targets = targets.to(logits.device)
    nll = nn.functional.cross_entropy(logits, targets, reduction="none").double().cpu()
    missed = (logits.argmax(-1) != targets).double().cpu()
    totals = torch.zeros(3, count, dtype=torch.float64)
    for total, values in zip(totals, (nll, missed, torch.ones_like(nll)), strict=True):
        total.index_add_(0, rows, values)
    return [Span(loss / n, miss == 0) for loss, miss, n in totals.t().tolist()]


def _any(model: Logits, groups: Sequence[Sequence[Candidate]], device: torch.device | str) -> list[Span]:
    flat = [candidate for group in groups for candidate in group]
    rows, positions, targets = _scored(flat, [0] * len(flat))
    idx = _padded([candidate.tokens for candidate in flat], device)
    logits = model(idx, rows.to(device), positions.to(device))
    return _spans(logits.float(), rows, targets, len(flat))


def _ours(model: GPT, groups: Sequence[Sequence[Candidate]], device: torch.device | str) -> list[Span]:
    flat = [candidate for group in groups for candidate in group]
    shared = [_shared(group) for group in groups]
    if min(shared) >= WORTH_SHARING:
        skipped = [skip for group, skip in zip(groups, shared, strict=True) for _ in group]
        tails = [candidate.tokens[skip:] for candidate, skip in zip(flat, skipped, strict=True)]
        heads = [group[0].tokens[:skip] for group, skip in zip(groups, shared, strict=True)]
        x = _continued(model, heads, [len(group) for group in groups], tails, device)
    else:
        skipped = [0] * len(flat)
        x = model.hidden(_padded([candidate.tokens for candidate in flat], device))
    rows, positions, targets = _scored(flat, skipped)
    return _spans(model.logits(x[rows.to(device), positions.to(device)]), rows, targets, len(flat))


def _continued(
    model: GPT,
    heads: Sequence[Sequence[int]],
    counts: Sequence[int],
    tails: Sequence[Sequence[int]],
    device: torch.device | str,
) -> Tensor:
    """Hidden states (B, T, C) of tails: the first counts[0] of them continue heads[0], the next counts[1]
    heads[1], and so on. Every head is read once."""
    kept: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer (heads, Hk, S, D)

    def keep(layer: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept.append((k, v))
        return attention.causal(q, k, v, window)

    model.hidden(_padded(heads, device), attend_as=keep)
    idx = _padded(tails, device)
    B, T = idx.shape
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], device=device)  # (B,)
    size = torch.tensor([len(head) for head in heads], device=device)[owner, None]
    last = torch.tensor([head[-1] for head in heads], device=device)[owner]
    at = size + torch.arange(T, device=device)  # (B, T)
    s = torch.arange(max(map(len, heads)), device=device).expand(B, -1)
    s = s.masked_fill(s >= size, model.config.positions)  # padding lies ahead of every token
    s = torch.cat((s, at), dim=1)[:, None]  # (B, 1, S + T)
    masks: dict[int, Tensor] = {}  # of each window

    def attend(layer: int, window: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if window not in masks:
            masks[window] = (s <= at[..., None]) & (s >= at[..., None] - window)  # (B, T, S + T)
        k, v = (torch.cat((old[owner], new), dim=2) for old, new in zip(kept[layer], (k, v), strict=True))
        return attention.cached(q, k, v, masks[window])

    return model.hidden(idx, After(at, last), attend)


def _shared(group: Sequence[Candidate]) -> int:
    """How many tokens of its candidates an example reads only once: their common beginning, without the last
    token before a scored one, whose logits are wanted of each.
    """
    alike = common_prefix([candidate.tokens for candidate in group]) if len(group) > 1 else 0
    return min(alike, *(candidate.start - 1 for candidate in group))
