"""MLServer with the bare classifier: images as raw PNG bodies, or as Base64 in its protocol, then in batches."""

import base64
from typing import Annotated

import numpy as np
from classifier import Classifier
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
            np.stack([self.classifier.decode(base64.b64decode(image)) for image in encoded])
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
        return Classifier.told(self.classifier.predict(self.classifier.decode(image)[None])[0])
