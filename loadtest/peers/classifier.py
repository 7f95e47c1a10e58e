"""The bare classifier on ONNX Runtime, as every server here runs it."""

import io
import os

import numpy as np
import onnxruntime
from PIL import Image

RAW = "application/octet-stream"
"""The content type of pixels as they are: uint8, channel by channel, as many as the graph's input takes."""


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
        self._shape = tuple(self._session.get_inputs()[0].shape[1:])

    def pixels(self, data: bytes, content_type: str | None) -> np.ndarray:
        """Return a request's body as uint8 (C, H, W): raw pixels where its type says so, else a PNG."""
        return self.raw(data) if content_type == RAW else self.decoded(Image.open(io.BytesIO(data)))

    def raw(self, data: bytes) -> np.ndarray:
        """Return raw pixels as uint8 (C, H, W), without a copy; raises ``ValueError`` for another number of them."""
        return np.frombuffer(data, np.uint8).reshape(self._shape)

    @staticmethod
    def decoded(image: Image.Image) -> np.ndarray:
        """Return an image, grey or RGB, as uint8 (C, H, W)."""
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Return the probabilities (N, K) of images uint8 (N, C, H, W)."""
        images = np.divide(pixels, np.float32(255), dtype=np.float32, order="C")
        logits = self._session.run(["logits"], {self._input: images})[0]
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    @staticmethod
    def told(probabilities: np.ndarray) -> dict[str, object]:
        """Return one image's probabilities (K,) as an answer."""
        return {"class_index": int(probabilities.argmax()), "probabilities": probabilities.tolist()}
