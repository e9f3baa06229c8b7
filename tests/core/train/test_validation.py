"""Validation in pretraining: as much text as there is, and an error before any training if there is none."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tinytrain import documents

from nanochat_core.data.batch import Batch
from nanochat_core.eval.bpb import bits_per_byte
from nanochat_core.stage import Job, Runtime
from nanochat_core.stages import pretrain
from nanochat_core.store import sha256
from nanochat_core.tokenizer.bpe import Tokenizer


def job_over(base: Path, tokenizer: Tokenizer, validation: list[str]) -> Job:
    """A pretraining of two steps, 16 rows of 64 each."""

    def shard(name: str, texts: list[str]) -> dict[str, object]:
        path = base / "downloads" / name
        pq.write_table(pa.table({"text": texts}), path)
        known = {"size": 0, "sha256": sha256(path), "rows": len(texts), "row_groups": 1}
        return {"name": name, "path": name} | known

    for folder in ("downloads", "shards/s", "tokenizer/t", "pretrain/p"):
        (base / folder).mkdir(parents=True)
    tokenizer.save(base / "tokenizer/t")
    listed = {"train": [shard("a", documents(400))], "validation": [shard("b", validation)]}
    (base / "shards/s/shards.json").write_text(json.dumps(listed))
    config = pretrain.Config(
        depth=1, aspect=32, head_dim=32, sequence_len=64, total_batch=16 * 64, steps=2, prompts=()
    )
    inputs = {"text": base / "shards/s", "tokenizer": base / "tokenizer/t"}
    runtime = Runtime(base_dir=base, compile=False, threads=1, precision="fp32")
    return Job("pretrain", config, inputs, base / "pretrain/p", runtime, "p")


def test_less_text_than_one_batch_is_validated_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    job = job_over(tmp_path, tokenizer, documents(4))
    found = pretrain.run(job.config, job)
    assert 0 < float(found["val_bpb"] or 0) < float(found["val_bpb_start"] or 0) < 10


def test_validation_text_without_a_token_is_refused_before_any_training(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    job = job_over(tmp_path, tokenizer, ["", ""])
    with pytest.raises(ValueError, match="nothing to validate on"):
        pretrain.run(job.config, job)
    assert not (job.path / "metrics.jsonl").exists()


def test_a_loss_that_is_not_finite_is_no_result() -> None:
    ones = torch.ones((1, 4), dtype=torch.long)
    batch = Batch(ones, ones, ones.float(), 4.0, dict)
    with pytest.raises(ValueError, match="not finite"):
        bits_per_byte(
            lambda idx, targets, weights: (weights.sum(), torch.full(idx.shape, math.nan)),
            [batch],
            torch.ones(2),
            device=torch.device("cpu"),
            total=lambda *values: list(values),
        )
