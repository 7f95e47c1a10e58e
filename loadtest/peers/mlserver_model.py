"""MLServer with the bare classifier: images as PNG or pixels alone, or as Base64 in its protocol, then in batches."""

import base64
from typing import Annotated

import numpy as np
from classifier import RAW, Classifier
from fastapi import Body
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse


class Bare(MLModel):
    """Answer the protocol's requests, which MLServer gathers, and raw bodies, which it hands over one by one."""

    async def load(self) -> bool:
        self.classifier = Classifier()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        encoded = payload.inputs[0].data.root
        probabilities = self.classifier.predict(
            np.stack([self.classifier.pixels(base64.b64decode(image), "image/png") for image in encoded])
        )
        classes = probabilities.argmax(1).reshape(-1, 1)
        return InferenceResponse(
            model_name=self.name,
            outputs=[
                NumpyCodec.encode_output("class_index", classes),
                NumpyCodec.encode_output("probabilities", probabilities),
            ],
        )

    @custom_handler(rest_path="/classify")
    async def classify(self, image: Annotated[bytes, Body(media_type="image/png")]) -> dict[str, object]:
        return Classifier.told(self.classifier.predict(self.classifier.pixels(image, "image/png")[None])[0])

    @custom_handler(rest_path="/classify_raw")
    async def classify_raw(self, pixels: Annotated[bytes, Body(media_type=RAW)]) -> dict[str, object]:
        return Classifier.told(self.classifier.predict(self.classifier.raw(pixels)[None])[0])
