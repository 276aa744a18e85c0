"""What Prometheus reads at /metrics."""

from collections.abc import Iterable, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanojaxgpt.generate.engine import Engine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
TOKEN_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
GAUGES = {
    "queued": ("nanojaxgpt_queued_requests", "Requests that wait for a slot."),
    "busy": ("nanojaxgpt_busy_slots", "Slots that hold a request."),
    "slots": ("nanojaxgpt_slots", "Slots of the engine."),
}
COUNTERS = {
    "compiles": ("nanojaxgpt_compiles", "Programs compiled; constant after the start."),
    "prompt_tokens": ("nanojaxgpt_prompt_tokens", "Tokens read."),
    "generated_tokens": ("nanojaxgpt_generated_tokens", "Tokens generated."),
    "draft_tokens": ("nanojaxgpt_draft_tokens", "Tokens guessed, by lookahead."),
    "accepted_tokens": ("nanojaxgpt_accepted_tokens", "Tokens guessed right."),
}


class EngineCollector(Collector):
    """Reads the engines' numbers when they are asked for."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[Metric]:
        """Yield a family for each number, with a value for each model."""
        for kind, table in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for attribute, (name, about) in table.items():
                family = kind(name, about, labels=["model"])
                for model, engine in self.engines.items():
                    family.add_metric([model], getattr(engine, attribute))
                yield family


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(engines))
        self.requests = Counter(
            "nanojaxgpt_requests", "Requests by path and status.", ["path", "code"],
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "nanojaxgpt_request_seconds", "From a request's headers to the end of its answer.",
            ["path"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "nanojaxgpt_first_token_seconds", "From a request to its first token.", ["model"],
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "nanojaxgpt_token_seconds", "Time per token after the first.", ["model"],
            buckets=TOKEN_SECONDS, registry=registry,
        )  # fmt: skip

    content_type = CONTENT_TYPE_LATEST  # of `text`

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self.registry)
