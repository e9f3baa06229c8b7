"""The API's JSON: what clients send, what they get back, and how an error looks. All in OpenAI's shapes."""

import secrets
import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AfterValidator, BaseModel, Field, StringConstraints, ValidationInfo, field_validator

from nanochat_core.chat import conversation
from nanochat_core.chat.conversation import DEFAULT, AnswerDelta
from nanochat_core.infer.sampling import Sampling
from nanochat_core.tokenizer import render

# What clients send. Fields of OpenAI's API that are not named here (penalties, user, metadata, ...) are
# accepted and have no effect. Those that would change what kind of answer comes back are refused.

Stop = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def _refused(reason: str) -> AfterValidator:
    def check(value: Any) -> Any:
        if value:
            raise ValueError(reason)
        return value

    return AfterValidator(check)


class InPart(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class InMessage(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InPart]


class StreamOptions(BaseModel):
    include_usage: bool = False


class ResponseFormat(BaseModel):
    type: Annotated[str, Field(pattern="^text$")]


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
    logprobs: Annotated[bool | int | None, _refused("this server gives no log probabilities")] = None

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


NO_TOOLS = "this model calls no tools but its own calculator; ask without tools, or with tool_choice 'none'"


class ChatAsked(Asked):
    messages: list[InMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 20)
    tool_choice: Literal["none", "auto"] | None = None  # before `tools`, whose check reads it
    tools: list[Any] | None = None
    functions: Annotated[list[Any] | None, _refused(NO_TOOLS)] = None
    response_format: ResponseFormat | None = None

    @field_validator("tools")
    @classmethod
    def _no_tools(cls, tools: list[Any] | None, info: ValidationInfo) -> list[Any] | None:
        if tools and info.data.get("tool_choice") != "none":
            raise ValueError(NO_TOOLS)
        return tools

    def sampling(self, context: int) -> Sampling:
        asked = super().sampling(context)
        wanted = self.max_completion_tokens
        return asked if wanted is None else asked._replace(max_tokens=min(wanted, context))


class CompletionAsked(Asked):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]  # some clients send lists of one
    best_of: Literal[1] | None = None
    echo: Annotated[bool | None, _refused("the prompt is not repeated in the answer")] = None
    suffix: Annotated[str | None, _refused("this model writes on from a text, it fills no gaps")] = None

    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def messages_of(asked: list[InMessage], *, most: int, most_chars: int) -> list[render.Message]:
    """Our kind of messages. Neighbours with the same role, which some clients send, become one."""
    if len(asked) > most:
        raise ValueError(f"there are {len(asked)} messages, too long a conversation; {most} may be sent")
    messages: list[render.Message] = []
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
    if chars > most_chars:
        raise ValueError(f"the messages are too long: {chars:,} characters; {most_chars:,} may be sent")
    if messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's; there is nothing to answer")
    return messages


class ErrorInfo(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorInfo


class ApiError(HTTPException):
    """What went wrong, for a client."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code, self.param = code, param

    def body(self) -> dict[str, Any]:
        kind: Any = "invalid_request_error" if self.status_code < 500 else "server_error"
        return ErrorBody(
            error=ErrorInfo(message=self.detail, type=kind, param=self.param, code=self.code)
        ).model_dump()


# What clients get.


class Shape:
    """OpenAI's JSON for an answer. Tool calls, for which it has no place, come as `nanochat` beside it."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = uuid.uuid4().hex
        self.created = int(time.time())


class ChatShape(Shape):
    def whole(self, pieces: list[AnswerDelta], finish: str, usage: dict[str, int]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces if piece.kind == "text")
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if any(piece.kind != "text" for piece in pieces):
            message["nanochat"] = conversation.parts(pieces)
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        return self._with("chat.completion", choice) | {"usage": usage}

    def chunk(self, piece: AnswerDelta | None, finish: str | None) -> dict[str, Any]:
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
    def whole(self, pieces: list[AnswerDelta], finish: str, usage: dict[str, int]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        return self._with(text, finish) | {"usage": usage}

    def chunk(self, piece: AnswerDelta | None, finish: str | None) -> dict[str, Any]:
        return self._with("" if piece is None else piece.text, finish)

    def _with(self, text: str, finish: str | None) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self.id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}],
        }
