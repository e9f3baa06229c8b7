"""Whatever can be given CORE: a model of ours, or any causal language model of transformers."""

import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from nanochat_core.eval.core import Tokens
from nanochat_core.eval.spans import Logits
from nanochat_core.infer.exported import is_exported
from nanochat_core.infer.load import load_chat
from nanochat_core.model.gpt import GPT
from nanochat_core.sources.download import offline

UNLIMITED = 10**6  # a tokenizer that claims a longer context than this knows of none


class EvaluatedModel(NamedTuple):
    model: GPT | Logits
    tokenizer: Tokens
    context: int | None  # tokens it can read at once
    identity: str  # of these weights


def load_subject(name: str, device: torch.device) -> EvaluatedModel:
    """The model of a directory of ours, or else what transformers finds under the name or path."""
    directory = Path(name)
    if (directory / "job.json").is_file() or is_exported(directory):
        model, tokenizer = load_chat(directory, device)
        return EvaluatedModel(model, tokenizer, model.config.positions, identity(directory))
    return from_transformers(name, device)


def from_transformers(name: str, device: torch.device) -> EvaluatedModel:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            f"{name} is no model of ours, and transformers, which may know it, is not installed "
            f"(pip install 'nanochat-flow[transformers]')"
        ) from None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        place = name
        if offline() and not Path(name).is_dir():  # transformers itself would still ask for adapters
            place = snapshot_download(name, local_files_only=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{name} is no causal language model that can be loaded ({why}); "
            f"give a stage of the latest run, a directory, or a model's full name on the hub"
        ) from None
    config = model.config
    context = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    known = identity(Path(name)) if Path(name).is_dir() else f"{name} {getattr(config, '_commit_hash', None)}"
    tokens = TransformersTokens(tokenizer, name)
    logits = TransformersLogits(model.to(device).eval())
    return EvaluatedModel(logits, tokens, context if context < UNLIMITED else None, known)


class TransformersTokens:
    """A tokenizer of transformers, asked for plain text, and for the one token that begins a document."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        # Several families begin documents with the token that ended the one before.
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ValueError(f"the tokenizer of {name} has no token that begins or ends a document")
        self.bos: int = begin

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found


class TransformersLogits:
    """A causal language model of transformers. Padding is on the right, where it never looks."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def __call__(self, idx: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        options: dict[str, Any] = {"attention_mask": torch.ones_like(idx), "use_cache": False}
        if not self._keeps:
            logits: Tensor = self._model(idx, **options).logits
            return logits[rows, positions]
        kept = torch.unique(positions)  # of any row: logits of all positions may not fit
        logits = self._model(idx, **options, logits_to_keep=kept).logits
        return logits[rows, torch.searchsorted(kept, positions)]


def identity(directory: Path) -> str:
    """Of the files in a directory, by name, size and time: enough to tell one evaluation from another."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    known = [[str(p.relative_to(directory)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
