"""A trained model by the name that the user knows it by."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanochat_core.runner.status import find_model

if TYPE_CHECKING:
    from nanochat_core.infer.load import Loaded

BASE_DIR = "~/.cache/nanochat"


def load(
    model: str | Path | None = None,
    *,
    device: Literal["auto", "cpu", "cuda"] | str = "auto",
    base_dir: Path | None = None,
) -> "Loaded":
    """A finished model, ready to generate: `name, model, tokenizer = load("sft")`.

    `model` is a stage of the latest run in `base_dir` (None: the last one that leaves a model: rl, sft, mid,
    pretrain), a stage's directory, or a directory that `save` or `nanochat export` wrote. `base_dir` is by
    default NANOCHAT_BASE_DIR or ~/.cache/nanochat. `device` auto is a GPU if there is one. Weights are bf16
    on a GPU, and on a CPU that multiplies bf16 fast if the model is large enough to gain; fp32 otherwise.

    Raises ValueError if there is no such model, it is not finished, or a file of it is damaged.
    """
    base = base_dir or Path(os.environ.get("NANOCHAT_BASE_DIR") or BASE_DIR)
    root = base.expanduser().absolute()
    directory = find_model(root, None if model is None else str(model))
    import torch  # once there is something to load

    from nanochat_core.infer.load import Loaded, load_chat

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = directory.parent.name if (directory / "job.json").exists() else directory.name
    return Loaded(name, *load_chat(directory, device))
