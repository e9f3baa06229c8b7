"""The chat page and an OpenAI-compatible API over one model: local, bounded, silent about what is said."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field, StringConstraints
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_core.chat import conversation
from nanochat_core.chat.conversation import DEFAULT, Piece, Reader, fit
from nanochat_core.chat.load import Loaded
from nanochat_core.chat.serving import Batcher, Busy, Failed, Ticket
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.sampling import Sampling
from nanochat_core.tokenizer import chat

PAGE = Path(__file__).with_name("ui.html")
LOCAL = ("127.0.0.1", "localhost", "::1")

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one client may ask for."""

    body: int = 1 << 20  # bytes of a request
    messages: int = 500
    chars: int = 200_000  # of all messages together; tokenizing them takes about 20 ms
    seconds: float = 300.0  # of one answer, its wait included
    places: int = 64  # clients waiting for a row; one more is sent away with 429


# What clients send. Fields of OpenAI's API that are not named here are accepted and have no effect.

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class InPart(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class InMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InPart]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Asked(BaseModel):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 20)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)  # beyond OpenAI's; 0: no limit
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    def sampling(self, context: int) -> Sampling:
        return Sampling(
            temperature=DEFAULT.temperature if self.temperature is None else self.temperature,
            top_k=DEFAULT.top_k if self.top_k is None else self.top_k or None,
            top_p=1.0 if self.top_p is None else self.top_p,
            max_tokens=min(self.max_tokens or DEFAULT.max_tokens, context),
            seed=secrets.randbits(32) if self.seed is None else self.seed,
        )

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatAsked(Asked):
    messages: list[InMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)

    def sampling(self, context: int) -> Sampling:
        asked = super().sampling(context)
        wanted = self.max_completion_tokens
        return asked if wanted is None else asked._replace(max_tokens=min(wanted, context))


class CompletionAsked(Asked):
    prompt: str


class ApiError(Exception):
    """An answer in OpenAI's shape of an error."""

    def __init__(self, status: int, message: str, code: str, headers: dict[str, str] | None = None) -> None:
        self.status, self.message, self.code, self.headers = status, message, code, headers

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


class Measured:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()  # by how they ended
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token_seconds = 0.0
        self.first_tokens = 0


def create_app(
    engine: Engine,
    name: str,
    *,
    token: str | None = None,
    limits: Limits | None = None,
    hosts: Sequence[str] | None = LOCAL,
) -> FastAPI:
    """The application for one engine. `hosts`: the names it answers to, so that no page of another site can
    reach it under a name of its own; None: any."""
    limits = limits or Limits()
    batcher = Batcher(engine, places=limits.places)
    measured = Measured()
    started = int(time.time())
    page, policy = _page(PAGE.read_text(encoding="utf-8"), name)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limit=limits.body, hosts=hosts)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)

    async def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise ApiError(401, "a valid API key is needed: Authorization: Bearer ...", "invalid_api_key")

    protected = [Depends(authorized)]

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(page, headers=headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        if batcher.failure is not None:
            return JSONResponse({"status": "failed", "reason": batcher.failure}, 503)
        return JSONResponse({"status": "ok", "model": name, "key": token is not None})

    @app.get("/metrics", dependencies=protected)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(_prometheus(batcher, measured))

    @app.get("/v1/models", dependencies=protected)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name, started, engine)]}

    @app.get("/v1/models/{model:path}", dependencies=protected)
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return _model_card(name, started, engine)

    @app.post("/v1/chat/completions", dependencies=protected)
    async def chat_completions(asked: ChatAsked, http: Request) -> Response:
        check_model(asked.model)
        sampling = asked.sampling(engine.context)
        try:
            messages = _messages(asked.messages, limits)
            prompt = fit(engine.tokenizer, messages, engine.context, sampling.max_tokens)
        except ValueError as error:
            code = "context_length_exceeded" if "too long" in str(error) else "invalid_messages"
            raise ApiError(400, str(error), code) from None
        return await respond(asked, prompt, sampling, http, ChatShape(name))

    @app.post("/v1/completions", dependencies=protected)
    async def completions(asked: CompletionAsked, http: Request) -> Response:
        check_model(asked.model)
        if len(asked.prompt) > limits.chars:
            raise ApiError(
                400, f"the prompt has more than {limits.chars:,} characters", "context_length_exceeded"
            )
        prompt = [engine.tokenizer.bos, *engine.tokenizer.encode(asked.prompt)]
        return await respond(asked, prompt, asked.sampling(engine.context), http, CompletionShape(name))

    def check_model(asked: str | None) -> None:
        if asked not in (None, "", name):
            raise ApiError(404, f"there is no model {asked!r} here; this is {name!r}", "model_not_found")

    async def respond(
        asked: Asked,
        prompt: list[int],
        sampling: Sampling,
        http: Request,
        shape: "ChatShape | CompletionShape",
    ) -> Response:
        try:
            ticket = batcher.submit(prompt, sampling)
        except Busy:
            raise ApiError(429, "the server is full; try again soon", "busy", {"Retry-After": "1"}) from None
        except Failed as error:
            raise ApiError(503, f"the model has failed: {error}", "failed") from None
        except ValueError as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        answer = Answer(ticket, Reader(engine.tokenizer), asked.stops(), limits.seconds, measured)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return Stream(answer, _events(answer, shape, usage))
        try:
            pieces = await _unless_gone(http, answer.all())
        finally:
            answer.close()
        if pieces is None:
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(shape.whole(pieces, answer))

    return app


class Answer:
    """A ticket read as text, up to a stop sequence if one is asked for."""

    def __init__(
        self, ticket: Ticket, reader: Reader, stops: list[str], seconds: float, measured: Measured
    ) -> None:
        self._ticket, self._reader, self._stops, self._seconds = ticket, reader, stops, seconds
        self._measured = measured
        self._begin = time.perf_counter()
        self._held = ""  # text that may turn out to be the beginning of a stop sequence
        self.finish = ""
        measured.prompt_tokens += len(ticket.prompt)

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        try:
            async for tokens in self._ticket.tokens(self._seconds):
                if self._ticket.made and self._ticket.made == len(tokens):
                    self._measured.first_tokens += 1
                    self._measured.first_token_seconds += time.perf_counter() - self._begin
                self._measured.completion_tokens += len(tokens)
                some = [piece for token in tokens for piece in self._reader.read(token)]
                if self._ticket.finish is not None:
                    some += self._reader.end()
                yield self._cut(some)
                if self.finish:
                    return
            self.finish = self._ticket.finish or "stop"
            if self._held:
                yield [Piece("text", self._held)]
        except TimeoutError:
            self.finish = "timeout"
            raise ApiError(504, f"the answer took more than {self._seconds:g} s", "timeout") from None
        except Failed as error:
            self.finish = "error"
            raise ApiError(503, f"the model has failed: {error}", "failed") from None

    async def all(self) -> list[Piece]:
        return [piece async for some in self.pieces() for piece in some]

    def usage(self) -> dict[str, int]:
        prompt, made = len(self._ticket.prompt), self._ticket.made
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def close(self) -> None:
        if not self._ticket.closed:
            self._ticket.close()
            self._measured.answers[self.finish or "cancelled"] += 1

    def _cut(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces up to a stop sequence; what may yet become one is held back."""
        if not self._stops:
            return pieces
        free: list[Piece] = []
        for kind, text in pieces:
            if kind != "text":
                free += [Piece("text", self._held)] * bool(self._held) + [Piece(kind, text)]
                self._held = ""
                continue
            text = self._held + text
            places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
            if places:
                self.finish, self._held = "stop", ""
                return [*free, Piece("text", text[: min(places)])]
            held = max(
                (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
            )
            self._held = text[len(text) - held :]
            free.append(Piece("text", text[: len(text) - held]))
        return [piece for piece in free if piece.text]


class Stream(StreamingResponse):
    """Server-sent events. The row is freed however this ends, even if the client left before it began."""

    def __init__(self, answer: Answer, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


class Shape:
    """OpenAI's JSON for an answer. Tool calls, for which it has no place, come as `nanochat` beside it."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = uuid.uuid4().hex
        self.created = int(time.time())


class ChatShape(Shape):
    def whole(self, pieces: list[Piece], answer: Answer) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces if piece.kind == "text")
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if any(piece.kind != "text" for piece in pieces):
            message["nanochat"] = conversation.parts(pieces)
        choice = {"index": 0, "message": message, "finish_reason": answer.finish, "logprobs": None}
        return self._with("chat.completion", choice) | {"usage": answer.usage()}

    def chunk(self, piece: Piece | None, finish: str | None) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        if piece is not None and piece.kind == "text":
            delta = {"content": piece.text}
        elif piece is not None:
            delta = {"content": "", "nanochat": {"type": piece.kind, "text": piece.text}}
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return self._with("chat.completion.chunk", choice)

    def first(self) -> dict[str, Any]:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self._with("chat.completion.chunk", choice)

    def _with(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": [choice],
        }


class CompletionShape(Shape):
    def whole(self, pieces: list[Piece], answer: Answer) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return self._with(text, answer.finish) | {"usage": answer.usage()}

    def chunk(self, piece: Piece | None, finish: str | None) -> dict[str, Any]:
        return self._with("" if piece is None else piece.text, finish)

    def _with(self, text: str, finish: str | None) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}],
        }


async def _events(answer: Answer, shape: ChatShape | CompletionShape, usage: bool) -> AsyncIterator[str]:
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


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T | None:
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


def _messages(asked: list[InMessage], limits: Limits) -> list[chat.Message]:
    """Our kind of messages. Neighbours with the same role, which some clients send, become one."""
    if len(asked) > limits.messages:
        raise ValueError(
            f"there are {len(asked)} messages, too long a conversation; {limits.messages} may be sent"
        )
    messages: list[chat.Message] = []
    chars = 0
    for message in asked:
        role: Any = "system" if message.role == "developer" else message.role
        content: Any = message.content
        if not isinstance(content, str):
            content = [part.model_dump() for part in content]
            if all(part["type"] == "text" for part in content):
                content = "".join(part["text"] for part in content)
            elif role != "assistant":
                raise ValueError(f"a message of role {role!r} can have parts of type 'text' only")
        chars += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
        last = messages[-1] if messages else None
        if last is not None and last["role"] == role and role != "assistant":
            last["content"] = f"{last['content']}\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    if chars > limits.chars:
        raise ValueError(f"the messages are too long: {chars:,} characters; {limits.chars:,} may be sent")
    if messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's; there is nothing to answer")
    return messages


class Gate:
    """Turns away requests for another host, and bodies that are too large before they are read to the end."""

    def __init__(self, app: ASGIApp, limit: int, hosts: Sequence[str] | None) -> None:
        self._app, self._limit, self._hosts = app, limit, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]")
        if self._hosts is not None and host not in self._hosts:
            error = ApiError(421, "this server does not answer to that name", "wrong_host")
            await JSONResponse(error.body(), 421)(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        too_large = ApiError(413, f"a request may have {self._limit:,} bytes", "too_large")
        if not declared.isdigit() or int(declared) > self._limit:
            await JSONResponse(too_large.body(), 413)(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, too_large.message)
            return message

        await self._app(scope, counted, send)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"][1:]) or "the request"
    return JSONResponse(ApiError(400, f"{where}: {first['msg']}", "invalid_request").body(), 400)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, str(error.detail), "http_error").body()
    return JSONResponse(body, error.status_code, error.headers)


def _model_card(name: str, started: int, engine: Engine) -> dict[str, Any]:
    config = engine.model.config
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "nanochat",
        "context": engine.context,
        "params": engine.model.num_params(),
        "arch": config.arch,
    }


def _prometheus(batcher: Batcher, measured: Measured) -> str:
    running = batcher.engine.running
    lines = [
        "# TYPE nanochat_answers_total counter",
        *(f'nanochat_answers_total{{finish="{key}"}} {n}' for key, n in sorted(measured.answers.items())),
        "# TYPE nanochat_tokens_total counter",
        f'nanochat_tokens_total{{kind="prompt"}} {measured.prompt_tokens}',
        f'nanochat_tokens_total{{kind="completion"}} {measured.completion_tokens}',
        "# TYPE nanochat_rows gauge",
        f"nanochat_rows {batcher.engine.max_rows}",
        "# TYPE nanochat_rows_running gauge",
        f"nanochat_rows_running {running}",
        "# TYPE nanochat_clients gauge",
        f"nanochat_clients {len(batcher.tickets)}",
        "# TYPE nanochat_first_token_seconds summary",
        f"nanochat_first_token_seconds_sum {measured.first_token_seconds:.6f}",
        f"nanochat_first_token_seconds_count {measured.first_tokens}",
    ]
    return "\n".join(lines) + "\n"


def _page(html: str, name: str) -> tuple[str, str]:
    """The page with the model's name in it, and a policy that lets only its own script and style run."""
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    html = html.replace("{{model}}", escaped)

    def hashed(tag: str) -> str:
        found = re.search(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        assert found is not None
        return base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()

    policy = (
        f"default-src 'none'; script-src 'sha256-{hashed('script')}'; style-src 'sha256-{hashed('style')}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def serve(
    loaded: Loaded,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    rows: int = 16,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C. ValueError if the port is taken; port 0 takes any free one."""
    context = loaded.model.config.sequence_len
    engine = Engine(loaded.model, loaded.tokenizer, max_rows=rows, context=context)
    engine.reserve(context)
    local = host in LOCAL
    app = create_app(engine, loaded.name, token=token, limits=limits, hosts=LOCAL if local else None)
    with _listen(host, port) as listening:
        shown = f"[{host}]" if ":" in host else host
        say(f"{loaded.name} is at http://{shown}:{listening.getsockname()[1]}  (Ctrl-C ends it)")
        if not local and token is None:
            say("anyone who reaches this address can use it; --token SECRET asks for a key")
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    with contextlib.ExitStack() as unless_listening:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            listening = unless_listening.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, port))
            listening.listen(128)
        except OSError as error:
            hint = "is it taken? Choose another with --port" if port else "choose another --host"
            raise ValueError(f"cannot listen on {host}:{port} ({error.strerror}); {hint}") from None
        unless_listening.pop_all()
        return listening
