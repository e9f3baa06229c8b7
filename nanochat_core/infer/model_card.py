"""The model card: what a model is, how to talk to it, and the numbers that were measured on the way to it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_core.artifacts.store import read_result
from nanochat_core.model.shape import GPTConfig


def measured(directory: Path, stages: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """What these stages found out about the model in a stage's directory, or about those it was made from.

    The newest result counts where there are several. Nothing for a directory that no stage has left.
    """
    base_dir = directory.resolve().parents[1]
    family: set[str] = set()
    model: Path | None = directory.resolve()
    while model is not None and (model / "job.json").is_file():
        family.add(model.name)
        model = _model_of(base_dir, model)
    found: dict[str, Mapping[str, Any]] = {}
    for stage in stages if family else ():
        results = sorted((base_dir / stage).glob("*/result.json"), key=lambda path: path.stat().st_mtime)
        for path in results:
            about = _model_of(base_dir, path.parent)
            result = read_result(path.parent)
            if about is not None and about.name in family and result is not None:
                found[stage] = result["metrics"]
    return found


def _model_of(base_dir: Path, directory: Path) -> Path | None:
    """The model that a stage has read."""
    source = json.loads((directory / "job.json").read_text())["inputs"].get("model")
    return base_dir / source["stage"] / source["fingerprint"] if source else None


def model_card(config: GPTConfig, params: int, results: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The model card: what it is, how to talk to it, what was measured."""
    header = {"pipeline_tag": "text-generation", "language": "en", "tags": ["nanochat"]}
    if config.arch == "seed":
        header["library_name"] = "transformers"
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    rows = "\n".join(
        f"| {stage} | {metric} | {f'{value:.4f}' if isinstance(value, float) else value} |"
        for stage, metrics in results.items()
        for metric, value in metrics.items()
        if value is not None
    )
    measured = (
        f"| stage | metric | value |\n|---|---|---|\n{rows}" if rows else "Nothing was measured in this run."
    )
    if config.arch == "seed":
        use = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**inputs)[0]))
```

Calls of the calculator are answered by nanochat's own programs only: `nanochat chat .`"""
    else:
        use = (
            "```\nnanochat chat .\n```\n\nThe architecture is nanochat's own; transformers does not know it."
        )
    use += "\n\nThere is no GGUF file: llama.cpp's converter does not know this architecture."
    return f"""\
---
{front}
---
# {name}

A small language model trained end to end by nanochat: {params:,} parameters, architecture \
`{config.arch}`, {config.n_layer} layers of width {config.n_embd}, {config.vocab_size:,} tokens, \
context {config.sequence_len:,}.

It is a model for learning and experiments: it makes mistakes, states falsehoods with confidence, and \
nobody has tested it for safety.

## Use

{use}

## Measured

{measured}
"""
