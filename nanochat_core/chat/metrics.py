"""What /metrics shows, in Prometheus' words."""

from collections import Counter

from nanochat_core.chat.serving import Batcher


class Measured:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()  # by how they ended
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token_seconds = 0.0
        self.first_tokens = 0


def prometheus(batcher: Batcher, measured: Measured) -> str:
    running = batcher.engine.running
    lines = [
        "# TYPE nanochat_answers_total counter",
        *(f'nanochat_answers_total{{finish="{key}"}} {n}' for key, n in sorted(measured.answers.items())),
        "# TYPE nanochat_tokens_total counter",
        f'nanochat_tokens_total{{kind="prompt"}} {measured.prompt_tokens}',
        f'nanochat_tokens_total{{kind="completion"}} {measured.completion_tokens}',
        "# TYPE nanochat_rows gauge",
        f"nanochat_rows {batcher.engine.max_rows}",
        "# TYPE nanochat_rows_running gauge",
        f"nanochat_rows_running {running}",
        "# TYPE nanochat_clients gauge",
        f"nanochat_clients {len(batcher.tickets)}",
        "# TYPE nanochat_first_token_seconds summary",
        f"nanochat_first_token_seconds_sum {measured.first_token_seconds:.6f}",
        f"nanochat_first_token_seconds_count {measured.first_tokens}",
    ]
    return "\n".join(lines) + "\n"
