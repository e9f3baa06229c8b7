"""Many answers at once: one KV cache, rows that join and leave a running batch, tools called in the middle.

Rows 0..n-1 of the cache decode together; when one is done the last takes its place, so that the batch is
always one contiguous slice. Newcomers are read (prefilled) at the far end of the cache, each different prompt
once and in chunks while the others go on, and are then copied to where they decode.
"""

import copy
from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_core.infer.sampling import Sampler, Sampling, uniforms
from nanochat_core.infer.tool_use import ToolCalls
from nanochat_core.model.gpt import GPT, SOFTCAP
from nanochat_core.model.kv_cache import KVCache
from nanochat_core.tokenizer.bpe import Tokenizer

CHUNK_ALONE = 8192  # prompt tokens read in one pass while nobody is waiting for the next token
CHUNK_SHARED = 512  # and while others are: at d20 on a GB10 a pause of about 20 ms
ROUND = 64  # the cache's capacity is a multiple of this


class Completion(NamedTuple):
    """One answer, without its terminal token."""

    ids: list[int]
    mask: list[int]  # 1: sampled by the model, 0: forced in by a tool
    ended: bool  # the model ended its turn; False: it ran out of room


class Request:
    """One answer in the making; `ids` and `mask` grow with every step of the engine."""

    def __init__(self, prompt: tuple[int, ...], sampling: Sampling, limit: int) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit  # tokens there is room for
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.ended = False
        self.done = False
        self.cancelled = False
        self.forced: deque[int] = deque()
        self.tools: ToolCalls | None = None
        self.uniform = uniforms(sampling.seed, limit).tolist() if sampling.temperature else [0.0] * limit

    def take(self, token: int, terminals: tuple[int, ...]) -> None:
        """Append the sampled token, or the forced one that has to stand in its place."""
        if self.forced:
            token = self.forced.popleft()
            self.mask.append(0)
        elif token in terminals:
            self.ended = self.done = True
            return
        else:
            self.mask.append(1)
            if self.tools is not None:
                self.forced.extend(self.tools.follow(token))
        self.ids.append(token)
        self.done = len(self.ids) >= self.limit

    def completion(self) -> Completion:
        return Completion(self.ids, self.mask, self.ended)


class _Cohort:
    """Newcomers whose prompts are being read: the different prompts, longest first, who waits for each."""

    def __init__(self, requests: list[Request]) -> None:
        self.waiting: dict[tuple[int, ...], list[Request]] = {}
        for request in requests:
            self.waiting.setdefault(request.prompt, []).append(request)
        self.prompts = sorted(self.waiting, key=len, reverse=True)
        self.size = len(requests)
        self.read = 0  # tokens of every prompt already in the cache
        self.first: list[Tensor] = []  # logits after each prompt, the shortest prompt's first


class Engine:
    """Answers prompts with one model. Not thread-safe: one thread calls `step`, itself or through others."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 64,
        tools: bool = True,
        context: int | None = None,
    ) -> None:
        """`context`: the most tokens a row may hold; by default as far as the model's positions reach."""
        self.model = model
        self._ready = model if model.lm_head.weight.dtype == model.compute_dtype else _shell(model)
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.context = context or 10 * model.config.sequence_len
        self._tools = tools
        self._terminals = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
        self._device = model.lm_head.weight.device
        self._cache: KVCache | None = None
        self._queue: deque[Request] = deque()
        self._cohort: _Cohort | None = None
        self._rows: list[Request] = []
        self._sampler: Sampler | None = None

    # What callers use.

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Completion]:
        """Answer every prompt. One Sampling for all is one seed for all: equal prompts get equal answers."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        requests = [self.submit(prompt, s) for prompt, s in zip(prompts, each, strict=True)]
        while not all(request.done for request in requests):
            self.step()
        return [request.completion() for request in requests]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Generator[int]:
        """Token by token, forced ones included, the terminal one not. Closing the iterator frees the row."""
        request = self.submit(prompt, sampling)
        given = 0
        try:
            while given < len(request.ids) or not request.done:
                if given == len(request.ids):
                    self.step()
                    continue
                yield request.ids[given]
                given += 1
        finally:
            request.cancelled = True

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Request:
        """Put a prompt in the queue; the answer appears in the request as `step` is called."""
        sampling.check()
        room = self.context - len(prompt)
        if not prompt:
            raise ValueError("the prompt is empty; it needs at least one token")
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with its answer it must fit in {self.context}"
            )
        if self._ready is not self.model and not (self.waiting or self.running):
            self._refresh()
        request = Request(tuple(prompt), sampling, min(sampling.max_tokens, room))
        if self._tools:
            request.tools = ToolCalls(self.tokenizer)
        self._queue.append(request)
        return request

    @property
    def waiting(self) -> int:
        """Requests that have no row yet."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Rows in use, those whose prompt is being read included."""
        return len(self._rows) + (self._cohort.size if self._cohort else 0)

    @torch.no_grad()  # not inference_mode: RL trains the same model, its rotary table must stay ordinary
    def step(self) -> None:
        """Read a chunk of the newcomers' prompts, then give every running row its next token."""
        if any(request.cancelled for request in self._rows):
            self._keep([not request.cancelled for request in self._rows])
        if self._cohort is None:
            self._admit()
        if self._cohort is not None:
            self._prefill(self._cohort)
        if self._rows:
            self._decode()

    def reserve(self, tokens: int) -> KVCache:
        """Room for this many tokens in every row; what is there already stays."""
        old = self._cache
        if old is not None and old.capacity >= tokens:
            return old
        dtype = (
            torch.float32 if self._device.type == "cpu" else self.model.compute_dtype
        )  # fp32 attention is faster
        cache = KVCache(
            self.model.config, self.max_rows, -(-tokens // ROUND) * ROUND, device=self._device, dtype=dtype
        )
        if old is not None and self._rows:
            cache.k[:, :, :, : old.capacity] = old.k
            cache.v[:, :, :, : old.capacity] = old.v
            cache.length.copy_(old.length)
            cache.previous.copy_(old.previous)
        self._cache = cache
        return cache

    # What happens in a step.

    @torch.no_grad()
    def _refresh(self) -> None:
        """Take over the master weights, in the type they are used in: cast once, not at every token."""
        for ours, master in zip(self._ready.parameters(), self.model.parameters(), strict=True):
            ours.copy_(master)

    def _admit(self) -> None:
        """Take a cohort from the queue; a full engine waits for several free rows, to read them together."""
        while self._queue and self._queue[0].cancelled:
            self._queue.popleft()
        free = self.max_rows - len(self._rows)
        if not self._queue or free < min(len(self._queue), max(1, self.max_rows // 8)):
            return
        requests = [self._queue.popleft() for _ in range(min(free, len(self._queue)))]
        requests = [request for request in requests if not request.cancelled]
        if not requests:
            return
        self.reserve(max(len(request.prompt) + request.limit for request in requests))
        cohort = self._cohort = _Cohort(requests)
        self._span(self.max_rows - len(cohort.prompts), self.max_rows).length.zero_()

    def _prefill(self, cohort: _Cohort) -> None:
        """Read the next chunk of the prompts that are not finished: the first ones, as they go by length."""
        start = cohort.read
        prompts = [prompt for prompt in cohort.prompts if len(prompt) > start]
        budget = CHUNK_SHARED if self._rows else CHUNK_ALONE
        T = min(len(prompts[0]) - start, max(1, budget // len(prompts)))
        idx = torch.tensor(
            [[*p[start : start + T], *[0] * (start + T - len(p))] for p in prompts], device=self._device
        )
        last = torch.tensor([min(len(p) - start, T) - 1 for p in prompts], device=self._device)
        first_row = self.max_rows - len(cohort.prompts)
        cache = self._span(first_row, first_row + len(prompts))
        cache.high = start
        logits = self._logits(idx, cache, last)
        cohort.read = start + T
        finished = sum(len(p) <= cohort.read for p in prompts)
        if finished:
            cohort.first.insert(0, logits[len(prompts) - finished :])
        if finished == len(prompts):
            self._join(cohort)

    def _join(self, cohort: _Cohort) -> None:
        """Sample the newcomers' first tokens and move those that go on to rows of their own."""
        self._cohort = None
        groups = [cohort.waiting[prompt] for prompt in cohort.prompts]
        requests = [request for group in groups for request in group]
        source = [i for i, group in enumerate(groups) for _ in group]
        logits = torch.cat(cohort.first)[torch.tensor(source, device=self._device)]
        self._sample(logits, requests, self._sampler_for(requests))
        going_on = [
            (self.max_rows - len(groups) + i, request)
            for i, request in zip(source, requests, strict=True)
            if not (request.done or request.cancelled)
        ]
        n = len(self._rows)
        self._copy([row for row, _ in going_on], list(range(n, n + len(going_on))))
        self._rows += [request for _, request in going_on]
        self._sampler = None

    def _decode(self) -> None:
        rows = self._rows
        if self._sampler is None:
            self._sampler = self._sampler_for(rows)
        cache = self._span(0, len(rows))
        cache.high = max(len(request.prompt) + len(request.ids) for request in rows) - 1
        idx = torch.tensor([[request.ids[-1]] for request in rows], device=self._device)
        self._sample(self._logits(idx, cache, torch.zeros_like(idx[:, 0])), rows, self._sampler)
        if any(request.done for request in rows):
            self._keep([not request.done for request in rows])

    def _logits(self, idx: Tensor, cache: KVCache, last: Tensor) -> Tensor:
        """Logits (n, V) after position `last` of each row, not yet softcapped: the sampler does it to few."""
        model = self._ready
        x = model.hidden(idx, cache, last + 1)
        x = x[torch.arange(len(x), device=x.device), last]
        return model.lm_head(x)[:, : model.config.vocab_size]  # type: ignore[no-any-return]

    def _sampler_for(self, requests: list[Request]) -> Sampler:
        return Sampler([request.sampling for request in requests], self._device, SOFTCAP)

    def _sample(self, logits: Tensor, requests: list[Request], sampler: Sampler) -> None:
        uniform = torch.tensor(
            [request.uniform[len(request.ids)] for request in requests],
            dtype=torch.float64,
            device=self._device,
        )
        for request, token in zip(requests, sampler(logits, uniform).tolist(), strict=True):
            request.take(token, self._terminals)

    def _keep(self, keep: list[bool]) -> None:
        """Drop rows; the last ones that stay move into the gaps."""
        n = sum(keep)
        gaps = [row for row in range(n) if not keep[row]]
        movers = [row for row in range(n, len(keep)) if keep[row]]
        for gap, mover in zip(gaps, movers, strict=True):
            self._rows[gap] = self._rows[mover]
        self._copy(movers, gaps)
        del self._rows[n:]
        self._sampler = None

    def _copy(self, source: list[int], target: list[int]) -> None:
        """Copy what rows have read to other rows, all at once (a row may be both)."""
        moves = [(a, b) for a, b in zip(source, target, strict=True) if a != b]
        if not moves:
            return
        assert self._cache is not None
        cache, (a, b) = self._cache, torch.tensor(moves, device=self._device).T
        high = int(cache.length[a].max())
        cache.k[:, b, :, :high] = cache.k[:, a, :, :high]
        cache.v[:, b, :, :high] = cache.v[:, a, :, :high]
        cache.length[b] = cache.length[a]
        cache.previous[b] = cache.previous[a]

    def _span(self, start: int, stop: int) -> KVCache:
        """Rows start..stop of the cache as a cache of their own, sharing its memory."""
        assert self._cache is not None
        view = copy.copy(self._cache)
        view.k, view.v = view.k[:, start:stop], view.v[:, start:stop]
        view.length, view.previous = view.length[start:stop], view.previous[start:stop]
        return view


def _shell(model: GPT) -> GPT:
    """A model of the same shape with room for its weights in the type that it computes in."""
    with torch.device("meta"):
        shell = GPT(model.config).to(model.compute_dtype)
    shell.compute_dtype = model.compute_dtype
    return shell.to_empty(device=model.lm_head.weight.device).eval().requires_grad_(False)
