"""How well the base model predicts text: bits per byte on the beginning of the train shards and on the
validation shard."""

from pydantic import Field

from nanochat_core.artifacts.planned import Estimate, Planned, Speed
from nanochat_core.artifacts.stage import Job, Metrics, Recipe


class Config(Recipe):
    split_tokens: int = Field(20 * 2**19, ge=1)  # of each split

    def estimate(self, stage: Planned, speed: Speed) -> Estimate:
        return Estimate(2 * self.split_tokens / speed.read)


def run(cfg: Config, job: Job[Config]) -> Metrics:
    from itertools import islice

    from nanochat_core.artifacts.store import write_json
    from nanochat_core.data.packed import packed
    from nanochat_core.eval.bpb import bits_per_byte
    from nanochat_core.infer.exported import trained_model
    from nanochat_core.machine.ranks import ranks
    from nanochat_core.sources.documents import shard_list
    from nanochat_core.tokenizer.bpe import load_tokenizer

    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer).to(world.device)
        model.compute_dtype = world.dtype
        shards = shard_list(job.inputs["text"])
        T = model.config.sequence_len
        rows = job.runtime.device_batch.get(job.stage, 8)
        metrics: Metrics = {}
        for i, (split, files) in enumerate([("train", shards.train), ("val", shards.validation)]):
            batches = packed(files, tokenizer, rows=rows, T=T, cursor={}, epochs=1)
            metrics[f"{split}_bpb"] = bits_per_byte(
                model.loss,
                islice(batches, max(1, cfg.split_tokens // (rows * T))),
                tokenizer.token_bytes(),
                world,
            )
            job.record(step=i + 1, steps=2)
        # What follows is told of a change by an artefact's files, so the numbers are one.
        write_json(job.path / "bpb.json", metrics)
        return metrics
