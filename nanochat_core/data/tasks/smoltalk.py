"""SmolTalk in its small version: general conversations of several turns, with nothing to mark."""

from pathlib import Path

from nanochat_core.data.tasks.base import Problem, Rows, Split, view_size
from nanochat_core.data.tasks.tables import table


def load(split: Split, size: int | None, assets: Path | None) -> Rows:
    rows = table("smoltalk", split, assets)

    def row(index: int) -> Problem:
        messages = rows[index]["messages"]
        return Problem(messages=[{"role": m["role"], "content": m["content"]} for m in messages])

    return Rows("smoltalk", view_size(size, rows), row)
