"""One answer on its way to a client: read from the engine, cut at stop sequences, freed if it goes."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nanochat_core.chat.conversation import AnswerDelta, Detokenizer
from nanochat_core.chat.metrics import ServerMetrics
from nanochat_core.chat.schema import ApiError, ChatShape, CompletionShape
from nanochat_core.chat.serving import Failed, Ticket

T = TypeVar("T")


class StreamedAnswer:
    """A ticket read as text, up to a stop sequence if one is asked for."""

    def __init__(
        self, ticket: Ticket, reader: Detokenizer, stops: list[str], seconds: float, metrics: ServerMetrics
    ) -> None:
        self._ticket, self._reader, self._stops, self._seconds = ticket, reader, stops, seconds
        self._metrics = metrics
        self._begin = time.perf_counter()
        self._held = ""  # text that may turn out to be the beginning of a stop sequence
        self.finish = ""
        metrics.tokens.labels("prompt").inc(len(ticket.prompt))

    async def pieces(self) -> AsyncIterator[list[AnswerDelta]]:
        try:
            async for tokens in self._ticket.tokens(self._seconds):
                if self._ticket.made and self._ticket.made == len(tokens):
                    self._metrics.first_token_seconds.observe(time.perf_counter() - self._begin)
                self._metrics.tokens.labels("completion").inc(len(tokens))
                some = [piece for token in tokens for piece in self._reader.read(token)]
                if self._ticket.finish is not None:
                    some += self._reader.end()
                yield joined(self._cut(some))
                if self.finish:
                    return
            self.finish = self._ticket.finish or "stop"
            if self._held:
                yield [AnswerDelta("text", self._held)]
        except TimeoutError:
            self.finish = "timeout"
            raise ApiError(504, f"the answer took more than {self._seconds:g} s", "timeout") from None
        except Failed as error:
            self.finish = "error"
            raise ApiError(503, f"the model has failed: {error}", "failed") from None

    async def all(self) -> list[AnswerDelta]:
        return [piece async for some in self.pieces() for piece in some]

    def usage(self) -> dict[str, int]:
        prompt, made = len(self._ticket.prompt), self._ticket.made
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def close(self) -> None:
        if not self._ticket.closed:
            self._ticket.close()
            self._metrics.answers.labels(self.finish or "cancelled").inc()

    def _cut(self, pieces: list[AnswerDelta]) -> list[AnswerDelta]:
        """The pieces up to a stop sequence; what may yet become one is held back."""
        if not self._stops:
            return pieces
        free: list[AnswerDelta] = []
        for kind, text in pieces:
            if kind != "text":
                free += [AnswerDelta("text", self._held)] * bool(self._held) + [AnswerDelta(kind, text)]
                self._held = ""
                continue
            text = self._held + text
            places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
            if places:
                self.finish, self._held = "stop", ""
                return [*free, AnswerDelta("text", text[: min(places)])]
            held = max(
                (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
            )
            self._held = text[len(text) - held :]
            free.append(AnswerDelta("text", text[: len(text) - held]))
        return [piece for piece in free if piece.text]


def joined(pieces: list[AnswerDelta]) -> list[AnswerDelta]:
    """The same text in fewer pieces."""
    whole: list[AnswerDelta] = []
    for piece in pieces:
        if piece.kind == "text" and whole and whole[-1].kind == "text":
            whole[-1] = AnswerDelta("text", whole[-1].text + piece.text)
        else:
            whole.append(piece)
    return whole


class Stream(StreamingResponse):
    """Server-sent events. The row is freed however this ends, even if the client left before it began."""

    def __init__(self, answer: StreamedAnswer, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def events(
    answer: StreamedAnswer, shape: ChatShape | CompletionShape, usage: bool
) -> AsyncIterator[str]:
    try:
        if isinstance(shape, ChatShape):
            yield _event(shape.first())
        async for pieces in answer.pieces():
            for piece in pieces:
                yield _event(shape.chunk(piece, None))
        yield _event(shape.chunk(None, answer.finish))
        if usage:
            yield _event({**shape.chunk(None, None), "choices": [], "usage": answer.usage()})
    except ApiError as error:  # too late for a status code
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of the work, or None as soon as the client has hung up."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
