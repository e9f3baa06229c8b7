"""Supervised fine-tuning: the last polish on chosen conversations; only the assistant's own words are
learned."""

from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.train.config import ChatTraining


class Config(ChatTraining):
    # nanochat's mixture of 22 thousand rows, one epoch: less 373 of GSM8K, which validation has.
    mixture: dict[str, int] = {  # noqa: RUF012
        "arc_easy": 2_251,  # all that is trained on, as of the two below
        "arc_challenge": 1_119,
        "gsm8k": 7_100,
        "smoltalk": 10_000,  # the first ones of its order
        "identity": 1_000,
        "spelling": 300,
        "spellingbee": 300,
    }
    total_batch: int = 2**16  # about 130 conversations
    lr_fraction: float = 0.1
    warmup_steps: int = 0
    warmdown: float = 1.0  # falls from the first step to the last
    final_lr: float = 0.0
    eval_every: int = 50


def run(cfg: Config, job: Job[Config]) -> Metrics:
    from nanochat_core.train.finetune import train_on_conversations

    return train_on_conversations(cfg, job)
