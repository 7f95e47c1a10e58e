"""What the gateway tells Prometheus. Never a client or a request id as a label."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
SCORES = (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Hold one gateway's instruments in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests", "Inference requests by outcome: ok, or why not.", "model", "version", "outcome"
        )
        self.predictions = self._counter("predictions", "Images answered, by verdict.", "model", "verdict")
        self.alerts = self._counter("alerts", "Images alerted, by the protected answer.", "model", "class")
        self.label_changes = self._counter(
            "label_changes",
            "Images whose protected answer differs from the bare one, where both are computed.",
            "model",
        )
        self.defense_errors = self._counter("defense_errors", "Images on which the defense itself failed.", "model")
        self.rejected = self._counter("rejected", "Requests refused or given up, by the error's name.", "reason")
        self.alerts_written = self._counter("alerts_written", "Alerts written to the database.")
        self.alert_write_failures = self._counter("alert_write_failures", "Attempts to write alerts that failed.")
        self.scores = self._histogram("detector_score", "Detector scores.", SCORES, "model")
        self.stage_seconds = self._histogram("stage_seconds", "Seconds in each stage.", SECONDS, "stage")
        self.request_seconds = self._histogram("request_seconds", "Seconds for a whole request.", SECONDS, "model")
        self.batch_size = self._histogram("batch_size", "Images computed at once.", BATCHES, "model")
        self.queue_depth = self._gauge("queue_depth", "Images waiting for a model.", "model")
        self.alert_queue_depth = self._gauge("alert_queue_depth", "Alerts waiting to be written.")
        self.model_info = self._gauge(
            "model_info", "1 for every version in service.", "model", "version", "kind", "mode", "digest"
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Observe how long the block takes as a stage."""
        start = perf_counter()
        try:
            yield
        finally:
            self.stage_seconds.labels(name).observe(perf_counter() - start)

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"portcullis_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"portcullis_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"portcullis_{name}", text, labels, buckets=buckets, registry=self.registry)
