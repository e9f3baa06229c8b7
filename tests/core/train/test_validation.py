"""Validation in pretraining: as much text as there is, and an error before any training if there is none."""

import math
from pathlib import Path

import pytest
import torch
from tinytrain import WORLD, documents, pretraining_over

from nanochat_core.data.batch import Batch
from nanochat_core.eval.bpb import bits_per_byte
from nanochat_core.stages import pretrain
from nanochat_core.tokenizer.bpe import Tokenizer


def test_less_text_than_one_batch_is_validated_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    job = pretraining_over(tmp_path, tokenizer, documents(4))
    found = pretrain.run(job.config, job)
    assert 0 < float(found["val_bpb"] or 0) < float(found["val_bpb_start"] or 0) < 10


def test_validation_text_without_a_token_is_refused_before_any_training(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    job = pretraining_over(tmp_path, tokenizer, ["", ""])
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
            [1, 1],
            WORLD,
        )
