"""BentoML with the bare classifier: bodies of PNG or raw pixels one by one, or forms of them gathered into batches."""

import os
from pathlib import Path

import bentoml
import numpy as np
from classifier import Classifier
from PIL.Image import Image

gathering = {"batchable": True, "max_batch_size": int(os.environ["BENCH_BATCH"]), "max_latency_ms": 1000}


@bentoml.service(
    name="bare",
    workers=int(os.environ["BENCH_WORKERS"]),
    traffic={"timeout": 30},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Bare:
    """Answer all four."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(route="/png")
    def png(self, image: Image, /) -> dict[str, object]:
        return Classifier.told(self.classifier.predict(self.classifier.decoded(image)[None])[0])

    @bentoml.api(route="/raw")
    def raw(self, data: bytes, /) -> dict[str, object]:
        return Classifier.told(self.classifier.predict(self.classifier.raw(data)[None])[0])

    @bentoml.api(route="/gathered_png", **gathering)
    def gathered_png(self, images: list[Image]) -> list[dict[str, object]]:
        return self._answers([self.classifier.decoded(image) for image in images])

    @bentoml.api(route="/gathered_raw", **gathering)
    def gathered_raw(self, images: list[Path]) -> list[dict[str, object]]:
        return self._answers([self.classifier.raw(path.read_bytes()) for path in images])

    def _answers(self, batch: list[np.ndarray]) -> list[dict[str, object]]:
        return [Classifier.told(row) for row in self.classifier.predict(np.stack(batch))]
