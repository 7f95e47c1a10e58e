"""Plain images in, predictions out; and what is in service."""

import asyncio
from functools import partial

import numpy as np
from fastapi import APIRouter, Request, Response

from service.disclosure import discloses
from service.gateway import Gateway, ReceivedInput
from service.images import ImageRefused, decode_image, media_type_of
from service.routes.dependencies import CallerOf, GatewayOf
from service.schemas import ModelInfo, Models, Prediction, Predictions
from service.served import ServedModel
from service.uploads import Upload, read_uploads
from service.verdicts import Decision

router = APIRouter(prefix="/v1", tags=["images"])

IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "description": "One image, or several as multipart/form-data.",
        "content": {
            media_type: {"schema": {"type": "string", "format": "binary"}}
            for media_type in ("image/png", "image/jpeg", "image/webp")
        }
        | {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            }
        },
    }
}


@router.post("/models/{model}/predict", openapi_extra=IMAGE_BODY)
async def predict(
    request: Request, response: Response, gateway: GatewayOf, caller: CallerOf, model: str
) -> Predictions:
    """Classify images as they are: PNG, JPEG or WebP, as the body or as the parts of a form."""
    served = gateway.repository.get(model)
    async with gateway.request(served):
        uploads = await read_uploads(request, gateway.settings.max_images)
        with gateway.metrics.stage("decode"):
            images = await asyncio.to_thread(_decoded, uploads, served, gateway)
        received = [partial(_as_sent, upload) for upload in uploads]
        decision = await gateway.predict(served, images, received, caller)
        with gateway.metrics.stage("encode"):
            predictions = _predictions(decision, served, gateway)
    response.headers["x-request-id"] = caller.request_id
    return Predictions(model=served.name, version=str(served.version), predictions=predictions)


@router.get("/models")
async def models(gateway: GatewayOf) -> Models:
    """List what is in service and how it is protected; the threshold only where scores are disclosed."""
    return Models(models=[_info(served, gateway) for served in gateway.repository.all()])


def _decoded(uploads: list[Upload], served: ServedModel, gateway: Gateway) -> np.ndarray:
    images = []
    for number, upload in enumerate(uploads):
        try:
            images.append(decode_image(upload.data, served.manifest.input, max_pixels=gateway.settings.max_pixels))
        except ImageRefused as error:
            if len(uploads) == 1:
                raise
            raise ImageRefused(f"Image {number} ({upload.name}): {error}") from error
    return np.stack(images)


def _as_sent(upload: Upload) -> ReceivedInput:
    return ReceivedInput(upload.data, media_type_of(upload.data))


def _predictions(decision: Decision, served: ServedModel, gateway: Gateway) -> list[Prediction]:
    disclosure = gateway.settings.disclosure
    labels = served.manifest.labels
    tells_label = discloses(disclosure, "label")
    tells_probabilities = discloses(disclosure, "probabilities")
    scores = decision.scores if discloses(disclosure, "score") else None
    p_values = decision.p_values if discloses(disclosure, "p_value") else None
    bare = decision.undefended_class_index if discloses(disclosure, "undefended_class_index") else None
    predictions = []
    for row, verdict in enumerate(decision.verdicts):
        withheld = decision.class_index[row] < 0
        tell = tells_label and not withheld
        predictions.append(
            Prediction(
                label=decision.labels[row] if tell else None,
                class_index=int(decision.class_index[row]) if tell else None,
                probabilities=decision.probabilities[row].tolist() if tells_probabilities and not withheld else None,
                verdict=verdict,
                alert_id=decision.alert_ids[row],
                score=None if scores is None or verdict == "undefended" else float(scores[row]),
                p_value=None if p_values is None or verdict == "undefended" else float(p_values[row]),
                undefended_label=None if bare is None else labels[bare[row]],
            )
        )
    return predictions


def _info(served: ServedModel, gateway: Gateway) -> ModelInfo:
    manifest = served.manifest
    rate = manifest.false_positive_rate
    tells = discloses(gateway.settings.disclosure, "score")
    return ModelInfo(
        name=served.name,
        version=str(served.version),
        default=gateway.repository.get(served.name) is served,
        kind=manifest.kind,
        mode=served.mode,
        defended=served.defended,
        threshold=manifest.threshold if tells else None,
        false_positive_rate_budget=rate.budget if rate else None,
        false_positive_rate_realised=rate.realised if rate else None,
        metrics=manifest.metrics,
        input_shape=manifest.input.shape,
        labels=manifest.labels,
        digest=served.digest,
        created=manifest.created,
    )
