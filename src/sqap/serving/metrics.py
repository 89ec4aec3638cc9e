"""What Prometheus reads at ``/metrics``. Every server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one server.

    Args:
        waiting: tells how many robots wait.
        connected: tells how many robots are connected.
        ready: tells whether the server takes observations.
    """

    def __init__(
        self, waiting: Callable[[], int], connected: Callable[[], int], ready: Callable[[], bool]
    ) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        gauges: list[tuple[str, str, Callable[[], float]]] = [
            ("waiting", "Robots whose observation waits.", waiting),
            ("robots", "Robots connected.", connected),
            ("ready", "1 while the server takes observations.", ready),
        ]
        for name, text, read in gauges:
            Gauge(f"sqap_{name}", text, registry=registry).set_function(read)
        self.answers = Counter(
            "sqap_answers",
            "Observations by what they came to: acted, or why not.",
            ["outcome"],
            registry=registry,
        )
        self.connections = Counter(
            "sqap_connections", "Handshakes by what they came to.", ["outcome"], registry=registry
        )
        self.queue_seconds = Histogram(
            "sqap_queue_seconds",
            "For which an observation waited while the policy computed for others.",
            buckets=SECONDS,
            registry=registry,
        )
        self.overhead_seconds = Histogram(
            "sqap_overhead_seconds", "From an observation's arrival to its actions, without queue and step.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "sqap_step_seconds", "Of the policy's steps, of one or several robots.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.answer_seconds = Histogram(
            "sqap_answer_seconds", "From an observation's arrival to its actions.", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch = Histogram(
            "sqap_batch_size", "Robots that a step was for.", buckets=BATCHES, registry=registry
        )

    def too_many(self) -> None:
        """Count a connection that is dropped because too many are there."""
        self.connections.labels("too many").inc()

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
