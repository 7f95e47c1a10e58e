"""BentoML with the bare classifier: raw PNG bodies one by one, or forms of PNG files gathered into batches."""

import os

import bentoml
import numpy as np
from classifier import Classifier
from PIL.Image import Image


@bentoml.service(
    name="bare",
    workers=int(os.environ["BENCH_WORKERS"]),
    traffic={"timeout": 30},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Bare:
    """Answer both."""

    def __init__(self) -> None:
        self.classifier = Classifier()

    @bentoml.api(route="/raw")
    def raw(self, image: Image, /) -> dict[str, object]:
        return Classifier.told(self.classifier.predict(self.classifier.scale(image)[None])[0])

    @bentoml.api(
        route="/gathered",
        batchable=True,
        max_batch_size=int(os.environ["BENCH_BATCH"]),
        max_latency_ms=1000,
    )
    def gathered(self, images: list[Image]) -> list[dict[str, object]]:
        batch = np.stack([self.classifier.scale(image) for image in images])
        return [Classifier.told(row) for row in self.classifier.predict(batch)]
