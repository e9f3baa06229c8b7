"""One thread that runs the engine, many clients that await its answers."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

from nanochat_core.infer.engine import Engine, Request
from nanochat_core.infer.sampling import Sampling

Finish = Literal["stop", "length"]
# Between two pieces of news for one client: smooth to the eye, and an event costs more than a token.
PACE_SECONDS = 0.04


class Busy(Exception):
    """All rows and all places in the queue are taken."""


class Failed(Exception):
    """The engine's thread has ended with an error; nothing more will be answered."""


class Update(NamedTuple):
    """News of an answer: some more tokens; `finish` comes with the last ones."""

    tokens: list[int]
    finish: Finish | None = None
    error: str | None = None


class Ticket:
    """One client's answer in the making. Whoever holds it must `close` it, however it ends."""

    def __init__(self, batcher: "Batcher", prompt: Sequence[int], sampling: Sampling) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.closed = False
        self.finish: Finish | None = None
        self.made = 0  # tokens so far
        self._batcher = batcher
        self._waiting: list[int] = []  # tokens that the client has not been told of
        self._last: Update | None = None  # the one that ended it
        self._news, self._end = asyncio.Event(), asyncio.Event()

    async def tokens(self, seconds: float) -> AsyncIterator[list[int]]:
        """The first token at once, then those of each PACE_SECONDS together, until `finish` is set;
        TimeoutError when the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        while self.finish is None:
            await asyncio.wait_for(self._news.wait(), deadline - loop.time())
            self._news.clear()
            if self._last is not None and self._last.error is not None:
                raise Failed(self._last.error)
            tokens, self._waiting = self._waiting, []
            self.finish = self._last.finish if self._last is not None else None
            self.made += len(tokens)
            yield tokens
            if self.finish is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._end.wait(), PACE_SECONDS)

    def news(self, update: Update) -> None:
        self._waiting += update.tokens
        if update.finish is not None or update.error is not None:
            self._last = update
            self._end.set()
        self._news.set()

    def close(self) -> None:
        """Free the row, or the place in the queue."""
        self.closed = True
        self._batcher.tickets.discard(self)


class _Live(NamedTuple):
    ticket: Ticket
    request: Request


class Batcher:
    """Feeds the engine from an event loop: every step serves all clients that are there, new ones too."""

    def __init__(self, engine: Engine, *, places: int) -> None:
        """`places`: clients that may wait beside those that have a row."""
        self.engine = engine
        self.limit = engine.max_rows + places
        self.tickets: set[Ticket] = set()
        self.failure: str | None = None
        self._inbox: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve the event loop that this is called in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        for ticket in list(self.tickets):
            ticket.news(Update([], error="the server is shutting down"))
            ticket.close()
        self._inbox.put(None)
        await asyncio.to_thread(self._thread.join)

    def submit(self, prompt: Sequence[int], sampling: Sampling) -> Ticket:
        """Ask for an answer; ValueError, Busy or Failed if there will be none."""
        sampling.check()
        if len(prompt) >= self.engine.context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; with its answer it must fit in {self.engine.context}"
            )
        if self.failure is not None:
            raise Failed(self.failure)
        if len(self.tickets) >= self.limit:
            raise Busy
        ticket = Ticket(self, prompt, sampling)
        self.tickets.add(ticket)
        self._inbox.put(ticket)
        return ticket

    # From here on: the engine's thread.

    def _run(self) -> None:
        live: list[_Live] = []
        try:
            while self._welcome(live):
                for one in live:
                    one.request.cancelled = one.ticket.closed
                live = [one for one in live if not one.ticket.closed]
                before = [len(one.request.ids) for one in live]
                self.engine.step()
                updates = [
                    (ticket, Update(request.ids[n:], _finish(request)))
                    for (ticket, request), n in zip(live, before, strict=True)
                    if len(request.ids) > n or request.done
                ]
                self._loop.call_soon_threadsafe(_deliver, updates)
                live = [one for one in live if not one.request.done]
        except Exception as error:  # whatever it is, the clients must hear of it
            self._loop.call_soon_threadsafe(self._fail, f"{type(error).__name__}: {error}")

    def _welcome(self, live: list[_Live]) -> bool:
        """Take in new tickets; wait for one if there is nothing else to do. False: stop."""
        idle = not (live or self.engine.running or self.engine.waiting)
        while True:
            try:
                ticket = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if ticket is None:
                return False
            if not ticket.closed:
                live.append(_Live(ticket, self.engine.submit(ticket.prompt, ticket.sampling)))
                idle = False

    def _fail(self, message: str) -> None:
        self.failure = message
        for ticket in self.tickets:
            ticket.news(Update([], error=message))


def _deliver(updates: list[tuple[Ticket, Update]]) -> None:
    for ticket, update in updates:
        ticket.news(update)


def _finish(request: Request) -> Finish | None:
    if not request.done:
        return None
    return "stop" if request.terminal is not None else "length"
