"""Training on conversations: what midtraining and SFT share, which is everything but their numbers."""

from functools import partial
from typing import Any

from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.data.conversations import packed_conversations, tokens_per_epoch
from nanochat_core.data.mixture import load_mixture
from nanochat_core.data.tasks import own_file
from nanochat_core.infer.exported import trained_model
from nanochat_core.machine.ranks import ranks
from nanochat_core.tokenizer.bpe import load_tokenizer
from nanochat_core.train.config import ChatTraining, divides
from nanochat_core.train.setup import learned, new_state
from nanochat_core.train.supervised import train_supervised


def train_on_conversations(cfg: ChatTraining, job: Job[ChatTraining]) -> Metrics:
    """Go on from `job.inputs["model"]` over the mixture."""
    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer)
        T = model.config.sequence_len
        rows = divides(cfg.total_batch, T, f"{job.stage}.total_batch", world.size)
        assets = job.inputs.get("assets")
        for own in filter(None, map(own_file, cfg.rows())):
            job.made_from(own)
        mixture = load_mixture(cfg.rows(), "train", assets=assets, seed=cfg.seed, order=cfg.order)
        held_out = load_mixture(cfg.held_out(), "validation", assets=assets, seed=cfg.seed)
        steps = cfg.steps or max(1, round(tokens_per_epoch(mixture, tokenizer, T) / cfg.total_batch))
        packing: dict[str, Any] = {"T": T, "loss_on": cfg.loss_on, "rank": world.rank, "size": world.size}
        train_supervised(
            cfg,
            job,
            world,
            new_state(model, cfg.rates(cfg.total_batch), world),
            tokenizer,
            train=partial(packed_conversations, mixture, tokenizer, **packing),
            validation=partial(packed_conversations, held_out, tokenizer, **packing),
            rows=rows,
            steps=steps,
            eval_every=cfg.eval_every,
        )
        if not world.is_first:
            return {}
        return {
            **learned(job, steps),
            "steps": steps,
            "tokens": steps * cfg.total_batch,
            "conversations": len(mixture),
        }
