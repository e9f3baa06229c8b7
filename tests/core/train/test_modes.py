"""Validation in the middle of training sees the model as it will be used, not as it trains."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tinytrain import documents, job_in, pretraining_over, tiny_model

from nanochat_core.artifacts.stage import Runtime
from nanochat_core.eval import bpb
from nanochat_core.machine.ranks import pick_dtype
from nanochat_core.model.gpt import write_config
from nanochat_core.stages import pretrain, sft
from nanochat_core.tokenizer.bpe import Tokenizer
from nanochat_core.train import supervised
from nanochat_core.train.checkpoint import save_model
from nanochat_core.train.loop import _Runner


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What was done with the model, and whether it was in training mode then, in order."""
    seen: list[tuple[str, bool]] = []
    measure, backward = bpb.bits_per_byte, _Runner.backward

    def measured(loss: Any, *args: Any, **kwargs: Any) -> float:
        seen.append(("validated", loss.__self__.training))
        return measure(loss, *args, **kwargs)

    def trained(runner: Any, *args: Any) -> float:
        seen.append(("trained", runner.loss.__self__.training))
        return backward(runner, *args)

    monkeypatch.setattr(supervised, "bits_per_byte", measured)
    monkeypatch.setattr(_Runner, "backward", trained)
    return seen


EXPECTED = [("validated", False), ("trained", True), ("trained", True), ("validated", False)]


def test_pretraining_in_8_bits_validates_without_them(
    tmp_path: Path, tokenizer: Tokenizer, modes: list[tuple[str, bool]], capsys: pytest.CaptureFixture[str]
) -> None:
    job = pretraining_over(tmp_path, tokenizer, documents(40), precision="fp8")
    pretrain.run(job.config, job)
    assert modes == EXPECTED
    assert "emulated on a CPU" in capsys.readouterr().out


def test_fine_tuning_in_8_bits_validates_without_them(
    tmp_path: Path, tokenizer: Tokenizer, modes: list[tuple[str, bool]]
) -> None:
    at = tmp_path / "model"
    at.mkdir()
    model = tiny_model(tokenizer, T=128)
    tokenizer.save(at)
    write_config(at, model.config, tokenizer.fingerprint)
    save_model(at, model)
    config = sft.Config(mixture={"capitals": 8}, total_batch=128, steps=2, eval_every=0, eval_rows=4)
    job = job_in(tmp_path / "sft", device="cpu", precision="fp8", threads=1)
    job = dataclasses.replace(job, stage="sft", config=config, inputs={"model": at, "tokenizer": at})
    sft.run(config, job)
    assert modes == EXPECTED


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((12, 1), False)])
def test_hardware_without_8_bit_products_is_refused_before_any_work(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    runtime = Runtime(base_dir=Path(), precision="fp8")
    if refused:
        with pytest.raises(ValueError, match=r"A100 \(sm80\) cannot multiply in 8 bits"):
            pick_dtype(runtime, torch.device("cuda"))
    else:
        assert pick_dtype(runtime, torch.device("cuda")) == torch.bfloat16
