"""Counts and times for Prometheus. Labels are tiers and reasons; no key and no text is a label."""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    generate_latest,
    multiprocess,
)

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that names a folder for the numbers of all replicas of a node. A scrape reaches one
replica, which then answers for all of them."""


class Metrics:
    """The numbers of this process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"azeotrope_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "requests answered to their end", "tier")
        self._refused = counter("refused", "requests refused, by reason", "why")
        self._tokens = counter("tokens", "tokens of settled requests", "kind", "teacher")
        self._extraction = counter("extraction_looks", "scores of a key's last requests", "found")
        self._first = Histogram(
            "azeotrope_first_token_seconds",
            "from the engine's call to its first token",
            registry=self.registry,
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )

    def answered(self, tier: str) -> None:
        self._requests.labels(tier).inc()

    def refused(self, why: str) -> None:
        self._refused.labels(why).inc()

    def tokens(self, prompt: int, completion: int, *, undefended: bool) -> None:
        teacher = "undefended" if undefended else "defended"
        self._tokens.labels("prompt", teacher).inc(prompt)
        self._tokens.labels("completion", teacher).inc(completion)

    def extraction(self, suspicious: bool) -> None:
        self._extraction.labels("suspicious" if suspicious else "nothing").inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def page(self) -> tuple[bytes, str]:
        """The metrics in Prometheus's text format, and its content type."""
        registry = self.registry
        if os.environ.get(SHARED):
            # Reads the files that all processes of the node write. It needs a fresh registry, or
            # the numbers of this process would count twice.
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST
