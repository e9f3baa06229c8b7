"""What /metrics shows, in Prometheus' words."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Summary

from nanochat_core.chat.serving import Batcher


class ServerMetrics:
    """The metrics of one application, in a registry of its own."""

    def __init__(self, batcher: Batcher) -> None:
        self.registry = registry = CollectorRegistry()
        self.answers = Counter("nanochat_answers", "by how they ended", ["finish"], registry=registry)
        self.tokens = Counter("nanochat_tokens", "read and generated", ["kind"], registry=registry)
        self.first_token_seconds = Summary("nanochat_first_token_seconds", "its wait", registry=registry)
        gauges = {
            "nanochat_rows": ("sequences at once, at most", lambda: batcher.engine.max_rows),
            "nanochat_rows_running": ("sequences being generated", lambda: batcher.engine.running),
            "nanochat_clients": ("being answered or waiting", lambda: len(batcher.tickets)),
        }
        for name, (text, read) in gauges.items():
            Gauge(name, text, registry=registry).set_function(read)
