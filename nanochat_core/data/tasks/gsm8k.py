"""GSM8K: school mathematics in words, calling the calculator where the data has <<expression=result>>."""

import re
from pathlib import Path

from nanochat_core.data.tasks.base import (
    Problem,
    Rows,
    Split,
    call,
    dialogue,
    final_number,
    text,
    view_size,
)
from nanochat_core.data.tasks.tables import table
from nanochat_core.tokenizer.render import Part

CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    rows = table("gsm8k", split, assets)

    def row(index: int) -> Problem:
        found = rows[index]
        return dialogue(found["question"], parts(found["answer"]))

    return Rows("gsm8k", view_size(size, rows), row, final_number)


def parts(answer: str) -> list[Part]:
    """Words, and the calculator's calls between them."""
    found: list[Part] = []
    end = 0
    for marked in CALL.finditer(answer):
        if marked.start() > end:
            found.append(text(answer[end : marked.start()]))
        found += call(marked[1], marked[2])
        end = marked.end()
    return [*found, text(answer[end:])] if end < len(answer) else found
