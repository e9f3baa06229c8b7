"""What terminal and web share: a history made to fit the window, and tokens read as text and tool calls."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from nanochat_core.infer.sampling import Sampling
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.tokenizer.render import Message, Part, render_for_completion

DEFAULT = Sampling(temperature=0.6, top_k=50, max_tokens=512)

Kind = Literal["text", "python", "python_output"]


class AnswerDelta(NamedTuple):
    """Some more of an answer: its words, a call it makes, or what the tool said."""

    kind: Kind
    text: str


def fit(tokenizer: Tokenizer, messages: Sequence[Message], context: int, answer: int) -> list[int]:
    """The prompt for the next answer. Whole exchanges are left out, oldest first, until it fits.

    At most half of the window is kept for the answer. A system message always stays.
    """
    room = context - min(answer, context // 2)
    system = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    while True:
        prompt = render_for_completion(tokenizer, {"messages": [*system, *turns]})
        if len(prompt) <= room:
            return prompt
        if len(turns) <= 2:
            raise ValueError(
                f"the last message is too long: with it the prompt has {len(prompt)} tokens, "
                f"and this model reads at most {room} before an answer"
            )
        turns = turns[2:]


class Detokenizer:
    """Reads an answer token by token; gives text as soon as, and only when, its characters are whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._switch: dict[int, Kind] = {
            tokenizer.special("<|python_start|>"): "python",
            tokenizer.special("<|python_end|>"): "text",
            tokenizer.special("<|output_start|>"): "python_output",
            tokenizer.special("<|output_end|>"): "text",
        }
        self._specials = frozenset(tokenizer.specials.values())
        self._kind: Kind = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def read(self, token: int) -> list[AnswerDelta]:
        if token in self._switch:
            rest = self.end()
            self._kind = self._switch[token]
            return rest
        if token in self._specials:  # a turn's marker in the middle of an answer has no text
            return []
        text = self._decoder.decode(self._tokenizer.decode_bytes([token]))
        return [AnswerDelta(self._kind, text)] if text else []

    def end(self) -> list[AnswerDelta]:
        """What is left: a character that was never finished shows as U+FFFD."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return [AnswerDelta(self._kind, text)] if text else []


def parts(pieces: Iterable[AnswerDelta]) -> list[Part]:
    """The pieces of an answer as the parts of a message, ready to be history."""
    joined: list[Part] = []
    for kind, text in pieces:
        if joined and joined[-1]["type"] == kind:
            joined[-1]["text"] += text
        else:
            joined.append({"type": kind, "text": text})
    return joined or [{"type": "text", "text": ""}]
