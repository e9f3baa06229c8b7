"""What a reasoning model says in the end: its answer without the thoughts before it."""

import re

NAME = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|analysis|reflection|scratchpad)"
OPEN = re.compile(rf"<{NAME}>|\[{NAME}\]|◁{NAME}▷|<\|channel\|>analysis<\|message\|>", re.IGNORECASE)
CLOSE = re.compile(rf"</{NAME}>|\[/{NAME}\]|◁/{NAME}▷|<\|channel\|>final<\|message\|>", re.IGNORECASE)


def final_answer(text: str) -> str:
    """The text after the last thought; some servers cut off the mark where the first one begins. Thoughts
    that do not end leave what was said before them."""
    closed = [found.end() for found in CLOSE.finditer(text)]
    said = text[closed[-1] :] if closed else text
    opened = OPEN.search(said)
    return said[: opened.start()] if opened else said
