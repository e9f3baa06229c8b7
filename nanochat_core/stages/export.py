"""The finished model as a directory that leaves this machine: weights, tokenizer, settings, model card."""

from typing import Literal

from nanochat_core.artifacts.stage import Job, Metrics, Recipe


class Config(Recipe):
    name: str = "nanochat"  # the model card's title
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights; bfloat16 is half the size


def run(cfg: Config, job: Job[Config]) -> Metrics:
    """Write the export into the job's own directory, with the numbers of every evaluation that was run."""
    import torch

    from nanochat_core.artifacts.store import read_result
    from nanochat_core.infer.exported import export

    evaluations = {role: path for role, path in job.inputs.items() if role not in ("model", "tokenizer")}
    results = {role: read_result(path) or {} for role, path in evaluations.items()}
    params = export(
        job.inputs["model"],
        job.inputs["tokenizer"],
        job.path,
        dtype=getattr(torch, cfg.dtype),
        results={role: result.get("metrics", {}) for role, result in results.items()},
        name=cfg.name,
    )
    job.record(step=1, steps=1)
    return {"params": params, "bytes": (job.path / "model.safetensors").stat().st_size}
