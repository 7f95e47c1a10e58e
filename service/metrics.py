"""What the gateway tells Prometheus. Never a client or a request id as a label."""

from time import perf_counter
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
SCORES = (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

Stage = Literal["decode", "queue", "purify_classify_inspect", "encode"]


class Timed:
    """Observe how long a block takes, in seconds."""

    __slots__ = ("_histogram", "_start")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._histogram.observe(perf_counter() - self._start)


class ModelMetrics:
    """The instruments of one version, looked up once and not on every request."""

    def __init__(self, metrics: "Metrics", model: str, version: str, verdicts: tuple[str, ...]) -> None:
        self._requests, self._model, self._version = metrics.requests, model, version
        self.answered = metrics.requests.labels(model, version, "ok")
        self.predictions = {verdict: metrics.predictions.labels(model, verdict) for verdict in verdicts}
        self.label_changes = metrics.label_changes.labels(model)
        self.defense_errors = metrics.defense_errors.labels(model)
        self.scores = metrics.scores.labels(model)
        self.request_seconds = metrics.request_seconds.labels(model)

    def refused(self, outcome: str) -> None:
        """Count a request that got no answer, by why not."""
        self._requests.labels(self._model, self._version, outcome).inc()


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
        self.stages = {stage: self.stage_seconds.labels(stage) for stage in get_args(Stage)}
        self.request_seconds = self._histogram("request_seconds", "Seconds for a whole request.", SECONDS, "model")
        self.batch_size = self._histogram("batch_size", "Images computed at once.", BATCHES, "model")
        self.queue_depth = self._gauge("queue_depth", "Images waiting for a model.", "model")
        self.alert_queue_depth = self._gauge("alert_queue_depth", "Alerts waiting to be written.")
        self.model_info = self._gauge(
            "model_info", "1 for every version in service.", "model", "version", "kind", "mode", "digest"
        )

    def stage(self, name: Stage) -> Timed:
        """Observe how long the block takes as a stage."""
        return Timed(self.stages[name])

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"portcullis_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"portcullis_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"portcullis_{name}", text, labels, buckets=buckets, registry=self.registry)
