"""Midtraining: the base model learns the form of conversations, tool calls and many short facts."""

from nanochat_core.artifacts.stage import Job, Metrics
from nanochat_core.train.config import ChatTraining


class Config(ChatTraining):
    # nanochat's mixture of 850 thousand rows, one epoch, less 1,000 of SmolTalk and 373 of GSM8K, which
    # validation has.
    mixture: dict[str, int] = {  # noqa: RUF012
        "smoltalk": 459_341,  # all that is trained on, as of the two below
        "mmlu": 99_842,  # the auxiliary train set: how to answer with a letter
        "gsm8k": 7_100,
        "identity": 2_000,  # each conversation twice
        "spelling": 200_000,
        "spellingbee": 80_000,
    }
    warmup_steps: int = 0
    warmdown: float = 0.2
    final_lr: float = 0.0


def run(cfg: Config, job: Job[Config]) -> Metrics:
    from nanochat_core.train.finetune import train_on_conversations

    return train_on_conversations(cfg, job)
