"""The chat page and an OpenAI-compatible API over one model: local, bounded, silent about what is said."""

import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from nanochat_core.chat import page
from nanochat_core.chat.answer import Stream, StreamedAnswer, events, unless_gone
from nanochat_core.chat.conversation import Detokenizer, fit
from nanochat_core.chat.gate import LOCAL, Gate, RequestLimits, key_check, tell_errors_in_openais_shape
from nanochat_core.chat.metrics import ServerMetrics
from nanochat_core.chat.schema import (
    ApiError,
    Asked,
    ChatAsked,
    ChatShape,
    CompletionAsked,
    CompletionShape,
    ErrorBody,
    messages_of,
)
from nanochat_core.chat.serving import Batcher, Busy, Failed
from nanochat_core.infer.engine import Engine
from nanochat_core.infer.load import Loaded
from nanochat_core.infer.sampling import Sampling
from nanochat_core.model.gpt import GPT

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
STREAMED: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}


def create_app(
    engine: Engine,
    name: str,
    *,
    token: str | None = None,
    limits: RequestLimits | None = None,
    hosts: Sequence[str] | None = LOCAL,
    facts: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application for one engine. `hosts`: the names it answers to, so that no page of another site can
    reach it under a name of its own; None: any. `facts`: more about the model, for /v1/models."""
    limits = limits or RequestLimits()
    batcher = Batcher(engine, places=limits.places)
    metrics = ServerMetrics(batcher)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "nanochat"}
    card |= {"context": engine.context, **(facts or {})}
    html, policy = page.render(name)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, limits=limits, hosts=hosts)
    tell_errors_in_openais_shape(app)
    protected: dict[str, Any] = {"dependencies": [Depends(key_check(token))], "responses": ERRORS}
    answering = protected | {"responses": {200: {"content": STREAMED}, **ERRORS}}

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        headers = {
            "Content-Security-Policy": policy,
            "Cache-Control": "no-cache",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(html, headers=headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        if batcher.failure is not None:
            return JSONResponse({"status": "failed", "reason": batcher.failure}, 503)
        return JSONResponse({"status": "ok", "model": name, "key": token is not None})

    @app.get("/metrics", response_class=PlainTextResponse, **protected)
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", **protected)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}", **protected)
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return card

    @app.post("/v1/chat/completions", **answering)
    async def chat_completions(asked: ChatAsked, http: Request) -> Response:
        check_model(asked.model)
        sampling = asked.sampling(engine.context)
        try:
            messages = messages_of(asked.messages, most=limits.messages, most_chars=limits.chars)
            prompt = fit(engine.tokenizer, messages, engine.context, sampling.max_tokens)
        except ValueError as error:
            code = "context_length_exceeded" if "too long" in str(error) else "invalid_messages"
            raise ApiError(400, str(error), code) from None
        return await respond(asked, prompt, sampling, http, ChatShape(name))

    @app.post("/v1/completions", **answering)
    async def completions(asked: CompletionAsked, http: Request) -> Response:
        check_model(asked.model)
        text = asked.text()
        if len(text) > limits.chars:
            raise ApiError(
                400, f"the prompt has more than {limits.chars:,} characters", "context_length_exceeded"
            )
        prompt = [engine.tokenizer.bos, *engine.tokenizer.encode(text)]
        return await respond(asked, prompt, asked.sampling(engine.context), http, CompletionShape(name))

    def check_model(asked: str | None) -> None:
        if asked not in (None, "", name):
            raise ApiError(404, f"there is no model {asked!r} here; this is {name!r}", "model_not_found")

    async def respond(
        asked: Asked,
        prompt: list[int],
        sampling: Sampling,
        http: Request,
        shape: ChatShape | CompletionShape,
    ) -> Response:
        try:
            ticket = batcher.submit(prompt, sampling)
        except Busy:
            raise ApiError(
                429, "the server is full; try again soon", "busy", headers={"Retry-After": "1"}
            ) from None
        except Failed as error:
            raise ApiError(503, f"the model has failed: {error}", "failed") from None
        except ValueError as error:
            raise ApiError(400, str(error), "context_length_exceeded") from None
        answer = StreamedAnswer(ticket, Detokenizer(engine.tokenizer), asked.stops(), limits.seconds, metrics)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return Stream(answer, events(answer, shape, usage))
        try:
            pieces = await unless_gone(http, answer.all())
        finally:
            answer.close()
        if pieces is None:
            return Response(status_code=499)  # nobody is there to read it
        return JSONResponse(shape.whole(pieces, answer.finish, answer.usage()))

    return app


def about(model: GPT) -> dict[str, Any]:
    """What a client may want to know of the model beyond OpenAI's fields."""
    return {"params": model.num_params(), "arch": model.config.arch}


def serve(
    loaded: Loaded,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    rows: int = 16,
    limits: RequestLimits | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Serve until Ctrl-C. ValueError if the port is taken; port 0 takes any free one."""
    context = loaded.model.config.sequence_len
    engine = Engine(loaded.model, loaded.tokenizer, max_rows=rows, context=context)
    engine.reserve(context)
    local = host in LOCAL
    hosts = LOCAL if local else None
    app = create_app(engine, loaded.name, token=token, limits=limits, hosts=hosts, facts=about(loaded.model))
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
