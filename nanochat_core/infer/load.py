"""From a directory to a model one can talk to: a trained stage's, or an exported one."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat_core.infer.exported import is_exported, load_exported, trained_model
from nanochat_core.machine.hardware import cpu_multiplies_bf16
from nanochat_core.model.gpt import GPT
from nanochat_core.tokenizer.bpe import Tokenizer, load_tokenizer

HALF_FROM = 5_000_000  # parameters: a smaller model lies in the CPU's cache, bf16 would only cost casts


class Loaded(NamedTuple):
    """A model one can talk to, by the name it is shown under."""

    name: str
    model: GPT
    tokenizer: Tokenizer


def load_chat(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[GPT, Tokenizer]:
    """The model, ready to generate, and the tokenizer that it was trained with.

    `dtype` is that of weights and arithmetic; by default bf16 on a GPU, and on a CPU that multiplies it
    fast if the model is large enough to gain.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; give a stage's directory or an exported model's")
    if is_exported(directory):
        model, tokenizer = load_exported(directory)
    else:
        tokenizer = load_tokenizer(tokenizer_directory(directory))
        model = trained_model(directory, tokenizer)
    device = torch.device(device)
    dtype = dtype or fastest(model, device)
    model.compute_dtype = dtype
    return model.to(device=device, dtype=dtype), tokenizer


def fastest(model: GPT, device: torch.device) -> torch.dtype:
    """The type of weights that a model generates fastest with."""
    half = device.type == "cuda" or (model.num_params() >= HALF_FROM and cpu_multiplies_bf16())
    return torch.bfloat16 if half else torch.float32


def tokenizer_directory(directory: Path) -> Path:
    """Where the tokenizer lies that a stage has read: its job.json names it, base_dir is two levels up."""
    path = directory / "job.json"
    try:
        source = json.loads(path.read_text())["inputs"]["tokenizer"]
        return directory.resolve().parents[1] / str(source["stage"]) / str(source["fingerprint"])
    except FileNotFoundError:
        raise ValueError(f"{directory} holds neither an exported model nor a trained stage's") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} does not name the tokenizer that the stage has read") from None
