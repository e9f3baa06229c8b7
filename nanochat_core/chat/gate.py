"""What stands before the API: limits, the key, the names it answers to, and every error in OpenAI's shape."""

import asyncio
import hmac
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat_core.chat.schema import ApiError

LOCAL = ("127.0.0.1", "localhost", "::1")

Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]


@dataclass(frozen=True)
class RequestLimits:
    """What one client may ask for."""

    body: int = 1 << 20  # bytes of a request
    upload: float = 30.0  # seconds for a request to arrive
    messages: int = 500
    chars: int = 200_000  # of all messages together; tokenizing them takes about 20 ms
    seconds: float = 300.0  # of one answer, its wait included
    places: int = 64  # clients waiting for a row; one more is sent away with 429


class Gate:
    """Turns away requests for another host, and bodies that are too large or too slow to arrive."""

    def __init__(self, app: ASGIApp, limits: RequestLimits, hosts: Sequence[str] | None) -> None:
        self._app, self._limits, self._hosts = app, limits, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).strip("[]")
        if self._hosts is not None and host not in self._hosts:
            await _refuse(ApiError(421, "this server does not answer to that name", "wrong_host"))(
                scope, receive, send
            )
            return
        limit = self._limits.body
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > limit:
            await _refuse(_too_large(limit))(scope, receive, send)
            return
        size, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._limits.upload

        async def counted() -> Message:
            nonlocal size, complete
            try:
                message = await _before(None if complete else deadline, receive)
            except TimeoutError:
                raise ApiError(
                    408, f"the request took more than {self._limits.upload:g} s to arrive", "too_slow"
                ) from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, counted, send)


async def _before(deadline: float | None, receive: Receive) -> Message:
    async with asyncio.timeout_at(deadline):
        return await receive()


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"a request may have {limit:,} bytes", "too_large")


def key_check(token: str | None) -> Callable[[Bearer], Awaitable[None]]:
    """A dependency that lets nobody pass without the key, if there is one; its time tells nothing."""

    async def authorized(bearer: Bearer) -> None:
        given = bearer.credentials if bearer is not None else ""
        if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer ...",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return authorized


def tell_errors_in_openais_shape(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)


def _refuse(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status_code, error.headers)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _refuse(error)


async def _invalid(_: Request, error: Exception) -> Response:
    """One thing that is wrong, and the field it is in."""
    assert isinstance(error, RequestValidationError)
    first = max(error.errors(), key=lambda found: len(found["loc"]))  # the deepest says most
    where = ".".join(str(step) for step in first["loc"][1:])
    says = first["msg"].removeprefix("Value error, ")
    message = f"{where or 'the request'}: {says}"
    return _refuse(ApiError(400, message, "invalid_request", param=where or None))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refuse(ApiError(error.status_code, str(error.detail), "http_error", headers=error.headers))
