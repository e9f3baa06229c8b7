"""Training on conversations: what midtraining and SFT share, which is everything but their numbers."""

from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.data.batch import ahead
from nanochat_core.data.conversations import packed_conversations, tokens_per_epoch
from nanochat_core.data.mixture import load_mixture
from nanochat_core.data.tasks import own_file
from nanochat_core.eval.bpb import bits_per_byte
from nanochat_core.infer.exported import trained_model
from nanochat_core.machine.ranks import ranks
from nanochat_core.model.flops import flops_per_token
from nanochat_core.tokenizer.bpe import load_tokenizer
from nanochat_core.train.checkpoint import TrainState
from nanochat_core.train.config import ChatTraining, divides
from nanochat_core.train.loop import Hook, fit
from nanochat_core.train.setup import byte_counts, learned, leave, new_state


def train_on_conversations(cfg: ChatTraining, job: Job[ChatTraining]) -> Metrics:
    """Go on from `job.inputs["model"]` over the mixture."""
    with ranks(job.runtime) as world:
        tokenizer = load_tokenizer(job.inputs["tokenizer"])
        model = trained_model(job.inputs["model"], tokenizer)
        shape = model.config
        T = shape.sequence_len
        rows = divides(cfg.total_batch, T, f"{job.stage}.total_batch", world.size)
        assets = job.inputs.get("assets")
        for own in filter(None, map(own_file, cfg.rows())):
            job.made_from(own)
        mixture = load_mixture(cfg.rows(), "train", assets=assets, seed=cfg.seed, order=cfg.order)
        held_out = load_mixture(cfg.held_out(), "validation", assets=assets, seed=cfg.seed)
        steps = cfg.steps or max(1, round(tokens_per_epoch(mixture, tokenizer, T) / cfg.total_batch))
        state = new_state(model, cfg.rates(cfg.total_batch), world)
        token_bytes = byte_counts(tokenizer, world.device)
        place = {"rank": world.rank, "size": world.size}

        def validate(state: TrainState) -> Metrics:
            batches = packed_conversations(
                held_out,
                tokenizer,
                rows=max(1, min(rows, 32)),
                T=T,
                loss_on=cfg.loss_on,
                cursor={},
                epochs=1,
                **place,
            )
            state.model.eval()  # in full precision, also where training multiplies in 8 bits
            value = bits_per_byte(
                state.model.loss, batches, token_bytes, device=world.device, total=world.sum
            )
            state.model.train()
            return {"val_bpb": value}

        fit(
            job,
            world,
            state,
            lambda state: ahead(
                packed_conversations(
                    mixture, tokenizer, rows=rows, T=T, loss_on=cfg.loss_on, cursor=state.cursor, **place
                ),
                pin=world.device.type == "cuda",
            ),
            steps=steps,
            schedule=cfg.schedule(),
            grad_clip=cfg.grad_clip,
            hooks=[Hook(cfg.eval_every, validate)],
            flops_per_token=flops_per_token(shape),
            compile=job.runtime.compile,
        )
        leave(job, world, state, tokenizer)
        if not world.is_first:
            return {}
        return {
            **learned(job, steps),
            "steps": steps,
            "tokens": steps * cfg.total_batch,
            "conversations": len(mixture),
        }
