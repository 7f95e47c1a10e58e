"""The bare classifier on ONNX Runtime, as every server here runs it."""

import io
import os

import numpy as np
import onnxruntime
from PIL import Image


class Classifier:
    """Classify images with the graph that ``BENCH_MODEL`` names, in ``BENCH_THREADS`` threads."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name

    def decode(self, data: bytes) -> np.ndarray:
        """Return a PNG as float32 (C, H, W) in [0, 1]."""
        return self.scale(Image.open(io.BytesIO(data)))

    def scale(self, image: Image.Image) -> np.ndarray:
        """Return an image as float32 (C, H, W) in [0, 1]."""
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        return np.divide(pixels, np.float32(255), dtype=np.float32)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, K) of images (N, C, H, W) in [0, 1]."""
        logits = self._session.run(["logits"], {self._input: images})[0]
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    @staticmethod
    def told(probabilities: np.ndarray) -> dict[str, object]:
        """Return one image's probabilities (K,) as an answer."""
        return {"class_index": int(probabilities.argmax()), "probabilities": probabilities.tolist()}
