"""Many answers at once: rows that join and leave a running batch, tools called in the middle.

Rows 0..n-1 of the cache decode together; when one is done the last takes its place, so that the batch is
always one contiguous slice. Newcomers are read in pieces in the rows above it, in the same passes in which
the others get their next tokens. What a row has read stays there until the row is needed: a newcomer whose
prompt begins like something that was read before (an earlier turn, the same question) takes that over and
reads the rest.
"""

from collections import deque
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_core.infer.decoder import Decoder, PromptChunk
from nanochat_core.infer.sampling import Sampler, Sampling, uniforms
from nanochat_core.infer.tool_use import ToolCalls
from nanochat_core.model.gpt import GPT
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.render import Message, render_for_completion

# Prompt tokens read in one pass while nobody is waiting for the next token, and while others are. At d20 on a
# GB10 512 are a pause of about 20 ms; a CPU is busy with 128, more would only make the first token late.
CHUNKS = {"cuda": (8192, 512), "cpu": (512, 128)}
SHARED_FROM = 16  # a common beginning shorter than this is read again rather than looked for
GREEDY = Sampling()
ROUND = 64  # the cache's capacity is a multiple of this


class Completion(NamedTuple):
    """One answer, without its terminal token."""

    ids: list[int]
    mask: list[int]  # 1: sampled by the model, 0: forced in by a tool
    terminal: int | None  # what the model ended its turn with; None: it ran out of room

    @property
    def ended(self) -> bool:
        return self.terminal is not None


class Request:
    """One answer in the making; `ids` and `mask` grow with every step of the engine."""

    def __init__(
        self, prompt: tuple[int, ...], sampling: Sampling, limit: int, terminals: frozenset[int]
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.limit = limit  # tokens there is room for
        self.terminals = terminals
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.terminal: int | None = None
        self.done = False
        self.cancelled = False
        self.read = 0  # tokens, of the prompt and then of the answer, that are in the row
        self.forced: deque[int] = deque()
        self.tools: ToolCalls | None = None
        self.uniform: list[float] = uniforms(sampling.seed, limit).tolist() if sampling.temperature else []

    def take(self, token: int) -> None:
        """Append the sampled token, or the forced one that has to stand in its place."""
        if self.forced:
            token = self.forced.popleft()
            self.mask.append(0)
        elif token in self.terminals:
            self.terminal, self.done = token, True
            return
        else:
            self.mask.append(1)
            if self.tools is not None:
                self.forced.extend(self.tools.follow(token))
        self.ids.append(token)
        self.done = len(self.ids) >= self.limit

    def in_row(self) -> tuple[int, ...]:
        """What its row has read."""
        return (*self.prompt, *self.ids)[: self.read]

    def completion(self) -> Completion:
        return Completion(self.ids, self.mask, self.terminal)


class _Reading(NamedTuple):
    """A newcomer and the row that its prompt is read into."""

    request: Request
    row: int


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
        self.tokenizer = tokenizer
        self.max_rows = max_rows
        self.context = context or model.config.positions
        self._tools = tools
        self._terminals = frozenset((tokenizer.special("<|assistant_end|>"), tokenizer.bos))
        self._device = model.lm_head.weight.device
        self._chunks = CHUNKS[self._device.type]
        self._decoder = Decoder(model, max_rows)
        self._in_training = model.lm_head.weight.requires_grad
        self._queue: deque[Request] = deque()
        self._reading: list[_Reading] = []  # in the order of their rows
        self._rows: list[Request] = []
        self._left: list[tuple[int, ...]] = [()] * max_rows  # what rows not in use have read
        self._sampler: Sampler | None = None

    # What callers use.

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Completion]:
        """Answer every prompt. One Sampling for all is one seed for all: equal prompts get equal answers."""
        each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        requests = [self.submit(prompt, s) for prompt, s in zip(prompts, each, strict=True)]
        self.reserve(max((len(request.prompt) + request.limit for request in requests), default=0))
        while not all(request.done for request in requests):
            self.step()
        return [request.completion() for request in requests]

    def continue_text(self, prompt: str, sampling: Sampling = GREEDY) -> str:
        """What follows a text: for a model that was only pretrained. ValueError if the prompt is too long."""
        [completion] = self.complete([[self.tokenizer.bos, *self.tokenizer.encode(prompt)]], sampling)
        return self.tokenizer.decode(completion.ids)

    def reply(self, messages: Sequence[Message], sampling: Sampling = GREEDY) -> str:
        """The assistant's answer to a conversation that ends with the user's message: for a model that was
        trained on conversations. Calls of a tool are in it with their markers, as in `<|python_start|>2+2`.

        ValueError if the roles do not alternate or the conversation is longer than `context`.
        """
        prompt = render_for_completion(self.tokenizer, {"messages": list(messages)})
        [completion] = self.complete([prompt], sampling)
        return self.tokenizer.decode(completion.ids)

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
        if self._in_training and not (self.waiting or self.running):
            self._decoder.prepare()
            self.forget()  # other weights have read it
        limit = min(sampling.max_tokens, room)
        request = Request(tuple(prompt), sampling, limit, self._terminals.union(sampling.stop))
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
        return len(self._rows) + len(self._reading)

    def reserve(self, tokens: int) -> None:
        """Room for this many tokens in every row, so that the cache need not grow later."""
        if self._decoder.capacity < tokens:
            self._decoder.reserve(-(-tokens // ROUND) * ROUND)

    def forget(self) -> None:
        """Take nothing over from requests that are done."""
        self._left = [()] * self.max_rows

    @torch.inference_mode()
    def step(self) -> None:
        """Give every running row its next token, and read on in the newcomers' prompts, all in one pass."""
        self._drop_cancelled()
        pieces = self._plan()
        if not (self._rows or pieces):
            return
        running, size = self._rows, len(self._rows)
        tokens = [request.ids[-1] for request in running]
        before = [request.ids[-2] if len(request.ids) > 1 else request.prompt[-1] for request in running]
        positions = [request.read for request in running]
        wanted = list(range(size))
        for request in running:
            request.read += 1
        newcomers = []
        for piece, (request, _) in zip(pieces, self._reading, strict=False):
            stop = piece.start + piece.size
            padded = (-1, *request.prompt[:stop])
            tokens += request.prompt[piece.start : stop]
            before += padded[piece.start : stop]
            positions += range(piece.start, stop)
            request.read = stop
            if stop == len(request.prompt):
                wanted.append(len(tokens) - 1)
                newcomers.append(request)
        logits = self._decoder.read(
            tokens, before, positions, pieces, None if len(wanted) == len(tokens) else wanted
        )
        if wanted:
            self._sample(logits, [*running, *newcomers])
        self._join(len(newcomers))
        if any(request.done for request in self._rows):
            self._keep([not request.done for request in self._rows])

    # What happens in a step.

    def _drop_cancelled(self) -> None:
        if any(request.cancelled for request in self._rows):
            self._keep([not request.cancelled for request in self._rows])
        for request, row in self._reading:
            if request.cancelled:
                self._left[row] = request.in_row()
        self._reading = [reading for reading in self._reading if not reading.request.cancelled]
        if any(request.cancelled for request in self._queue):
            self._queue = deque(request for request in self._queue if not request.cancelled)

    def _plan(self) -> list[PromptChunk]:
        """What is read of the newcomers' prompts in this pass: the first come first."""
        budget = self._chunks[1 if self._rows else 0]
        pieces: list[PromptChunk] = []

        def read_on(reading: _Reading) -> None:
            nonlocal budget
            request = reading.request
            count = min(budget, len(request.prompt) - request.read)
            pieces.append(PromptChunk(reading.row, request.read, count))
            budget -= count

        for reading in self._reading:
            if budget:
                read_on(reading)
        later: deque[Request] = deque()
        known = self._known() if budget and self._queue else []
        while budget and self._queue:
            row = self._reading[-1].row + 1 if self._reading else len(self._rows)
            if row >= self.max_rows:
                break
            request = self._queue.popleft()
            shared, source = _longest(request.prompt, known)
            if any(_common(request.prompt, other.prompt) > shared for other, _ in self._reading):
                later.append(request)  # what both begin with is being read just now
                continue
            self._make_room(len(request.prompt) + request.limit)
            if shared and source != row:
                self._decoder.copy(source, row, shared)
            request.read = shared
            known[row] = request.prompt[:shared]
            self._reading.append(_Reading(request, row))
            read_on(self._reading[-1])
        self._queue.extendleft(reversed(later))
        return pieces

    def _make_room(self, tokens: int) -> None:
        """Like `reserve`, for a request that has come: grows by half at least, so that it grows seldom."""
        if self._decoder.capacity < tokens:
            self.reserve(max(tokens, min(self._decoder.capacity * 3 // 2, self.context)))

    def _known(self) -> list[tuple[int, ...]]:
        """What each row of the cache has read."""
        known = list(self._left)
        known[: len(self._rows)] = [request.in_row() for request in self._rows]
        for request, row in self._reading:
            known[row] = request.in_row()
        return known

    def _sample(self, logits: Tensor, requests: list[Request]) -> None:
        sampler = self._sampler
        if sampler is None or len(requests) != len(self._rows):
            sampler = Sampler([request.sampling for request in requests], self._device, raw=True)
            self._sampler = sampler if len(requests) == len(self._rows) else None
        uniform = None
        if sampler.random:
            numbers = [request.uniform[len(request.ids)] if request.uniform else 0.0 for request in requests]
            uniform = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        for request, token in zip(requests, sampler(logits, uniform).tolist(), strict=True):
            request.take(token)

    def _join(self, count: int) -> None:
        """The first `count` newcomers have their first token; those that go on become running rows."""
        for request, row in self._reading[:count]:
            self._left[row] = request.in_row()
            if not request.done:
                target = len(self._rows)
                if target != row:  # rows below have become free meanwhile
                    self._decoder.copy(row, target, request.read)
                self._rows.append(request)
                self._sampler = None
        del self._reading[:count]

    def _keep(self, keep: list[bool]) -> None:
        """Drop rows; the last ones that stay move into the gaps."""
        n = sum(keep)
        for row in range(n, len(keep)):
            self._left[row] = self._rows[row].in_row()
        gaps = [row for row in range(n) if not keep[row]]
        movers = [row for row in range(n, len(keep)) if keep[row]]
        for gap, mover in zip(gaps, movers, strict=True):
            self._rows[gap] = self._rows[mover]
            self._decoder.copy(mover, gap, self._rows[gap].read)
        del self._rows[n:]
        self._sampler = None


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """How many tokens two sequences begin with alike, the last of the first one not counted: its logits are
    wanted. 0 if they are too few to matter."""
    if a[:SHARED_FROM] != b[:SHARED_FROM]:
        return 0
    low, high = 0, min(len(a) - 1, len(b))
    while low < high:  # the longest equal beginning, by halving: comparing slices is fast
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low if low >= SHARED_FROM else 0


def _longest(prompt: tuple[int, ...], known: list[tuple[int, ...]]) -> tuple[int, int]:
    """The longest beginning of a prompt that a row has read, and the row."""
    return max(((_common(prompt, tokens), row) for row, tokens in enumerate(known)), default=(0, 0))
