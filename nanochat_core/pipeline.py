"""THE TABLE: every stage, in the order they run. Start reading here."""

from nanochat_core.artifacts.stage import Stage
from nanochat_core.stages import (
    assets,
    base_eval,
    base_loss,
    chat_eval,
    export,
    mid,
    pretrain,
    report,
    rl,
    sft,
    shards,
    tokenizer,
    tokenizer_eval,
)

STAGES = (
    Stage("assets", assets, version=2),  # 2: rows are held out of training for validation
    Stage(
        "shards_head", shards
    ),  # as many shards as the tokenizer reads, so that it need not wait for all of them
    Stage("shards", shards),
    Stage("tokenizer", tokenizer, reads={"text": "shards_head"}),
    Stage("tokenizer_eval", tokenizer_eval, reads={"text": "shards", "tokenizer": "tokenizer"}),
    Stage(
        "pretrain",
        pretrain,
        reads={"text": "shards", "tokenizer": "tokenizer"},
        ranks="all",
        device=True,
        version=2,  # 2: packing cuts the oldest document
        trains="base",
        shows=("params", "tokens", "flops", "val_bpb_start", "val_bpb"),
    ),
    Stage(
        "base_loss",
        base_loss,
        reads={"model": "pretrain", "tokenizer": "tokenizer", "text": "shards"},
        device=True,
        measures="base",
        shows=("val_bpb",),
    ),
    Stage(
        "base_eval",
        base_eval,
        reads={"model": "pretrain", "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        measures="base",
    ),
    Stage(
        "mid",
        mid,
        reads={"model": "pretrain", "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        trains="mid",
    ),
    Stage(
        "mid_eval",
        chat_eval,
        reads={"model": "mid", "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        measures="mid",
    ),
    Stage(
        "sft",
        sft,
        reads={"model": ("mid", "pretrain"), "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        trains="sft",
    ),
    Stage(
        "sft_eval",
        chat_eval,
        reads={"model": "sft", "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        measures="sft",
    ),
    Stage(
        "rl",
        rl,
        reads={"model": "sft", "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        trains="rl",
    ),
    Stage(
        "rl_eval",
        chat_eval,
        reads={"model": "rl", "tokenizer": "tokenizer", "assets": "assets"},
        ranks="all",
        device=True,
        measures="rl",
    ),
    Stage(
        "export",
        export,
        reads={"model": ("rl", "sft"), "tokenizer": "tokenizer"},
        gathers=("base_loss", "base_eval", "mid_eval", "sft_eval", "rl_eval"),
    ),
    Stage("report", report, gathers="all", reports=True),
)
