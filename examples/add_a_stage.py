"""A stage of your own: planned, run, cached and reported like the built-in ones, with no change in them.

    nanochat stage longest_tokens tiny --stage examples/add_a_stage.py:longest_tokens

This one lists the longest tokens of the vocabulary. docs/adding-a-stage.md explains each part, and shows a
stage that trains.
"""

from pydantic import Field

from nanochat_core.artifacts.stage import Job, Metrics, Recipe
from nanochat_core.artifacts.store import write_whole

ROW = {"reads": {"tokenizer": "tokenizer"}}  # role -> the stage that fills it


class Config(Recipe):
    count: int = Field(20, ge=1)  # how many to list: --set longest_tokens.count=50


def run(cfg: Config, job: Job[Config]) -> Metrics:
    from nanochat_core.tokenizer.bpe import load_tokenizer  # here, so that a plan loads nothing heavy

    tokenizer = load_tokenizer(job.inputs["tokenizer"])
    texts = [tokenizer.decode([i]) for i, size in enumerate(tokenizer.token_bytes()) if size]
    longest = sorted(texts, key=len, reverse=True)[: cfg.count]
    write_whole(job.path / "longest.txt", "".join(f"{text!r}\n" for text in longest))
    print("longest tokens:", *map(repr, longest[:5]))
    return {"longest": longest[0], "characters": len(longest[0])}
