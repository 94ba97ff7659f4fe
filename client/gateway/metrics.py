"""What Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from client.gateway.engine.engine import Engine


class Metrics:
    """Of one gateway."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("hivetune_requests", "Answered, by status.", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("hivetune_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.generated_tokens = Counter("hivetune_generated_tokens", "Tokens made.", registry=registry)
        self.first_token = Histogram(
            "hivetune_first_token_seconds", "From a request to its first token.", registry=registry
        )
        gauges = {
            "hivetune_running_texts": ("Texts in the making.", lambda: engine.running),
            "hivetune_waiting_texts": ("Texts that wait for others to end.", lambda: engine.waiting),
            "hivetune_kept_prefix_tokens": ("Tokens kept for prompts to come.", lambda: engine.prefixes.tokens),
            "hivetune_reused_prefix_tokens": ("Tokens of prompts that were kept.", lambda: engine.prefix_hits),
            "hivetune_own_seconds": ("That the gateway itself computed.", lambda: engine.own_seconds),
            "hivetune_rounds": ("Of tokens.", lambda: engine.rounds),
        }  # fmt: skip
        for name, (what, value) in gauges.items():
            Gauge(name, what, registry=registry).set_function(value)

    def page(self) -> bytes:
        """All of it, in Prometheus' form."""
        return generate_latest(self.registry)
