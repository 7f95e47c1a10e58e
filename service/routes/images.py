"""Plain images in, predictions out; and what is in service."""

from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from service.body_limit import read_body
from service.decoding import decode_uploads
from service.disclosure import discloses
from service.gateway import AlertIds, Gateway, ReceivedInput
from service.images import media_type_of
from service.routes.dependencies import TIMEOUT, GatewayOf, caller_of, gateway_of, timeout_of
from service.schemas import ModelInfo, Models, Prediction, Predictions
from service.served import ServedModel
from service.uploads import Upload, read_uploads
from service.verdicts import Decision

router = APIRouter(prefix="/v1", tags=["images"])

IMAGE_BODY = {
    "parameters": [TIMEOUT],
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
    },
}


@router.post("/models/{model}/predict", response_model=Predictions, openapi_extra=IMAGE_BODY)
async def predict(request: Request, model: str) -> Response:
    """Classify images as they are: PNG, JPEG or WebP, as the body or as the parts of a form."""
    gateway = gateway_of(request)
    served = gateway.repository.get(model)
    caller = caller_of(request)
    with gateway.bodies.room() as room:
        async with gateway.request(served) as timed:
            timed.shorten(timeout_of(request))
            served.check_room(1)
            # Not bound to a name: what a form was read from need not be kept beside what was read.
            uploads = await read_uploads(
                request, await read_body(request, gateway.settings.max_body_bytes, room), gateway.settings.max_images
            )
            served.check_room(len(uploads))
            with gateway.metrics.stage("decode"):
                decoding, most = gateway.decoding(served, caller), gateway.settings.max_pixels
                images = await decode_uploads(uploads, served.manifest.input, gateway.decoder, decoding, most)
            received = [partial(_as_sent, upload) for upload in uploads]
            decision, alert_ids = await gateway.predict(served, images, received, caller, timed.deadline)
            with gateway.metrics.stage("encode"):
                predictions = _predictions(decision, alert_ids, served, gateway)
                answer = to_json(Predictions(served.name, str(served.version), predictions))
    return Response(answer, media_type="application/json", headers={"x-request-id": caller.request_id})


@router.get("/models")
async def models(gateway: GatewayOf) -> Models:
    """List what is in service and how it is protected; the threshold only where scores are disclosed."""
    return Models(models=[_info(served, gateway) for served in gateway.repository.all()])


def _as_sent(upload: Upload) -> ReceivedInput:
    return ReceivedInput(upload.data, media_type_of(upload.data))


def _predictions(decision: Decision, alert_ids: AlertIds, served: ServedModel, gateway: Gateway) -> list[Prediction]:
    disclosure = gateway.settings.disclosure
    labels = served.manifest.labels
    tells_label = discloses(disclosure, "label")
    tells_probabilities = discloses(disclosure, "probabilities")
    scores = decision.scores if discloses(disclosure, "score") else None
    p_values = decision.p_values if discloses(disclosure, "p_value") else None
    bare = decision.undefended_class_index if discloses(disclosure, "undefended_class_index") else None
    predictions = []
    for row, (verdict, class_index) in enumerate(zip(decision.verdicts, decision.class_index.tolist(), strict=True)):
        tell = tells_label and class_index >= 0
        predictions.append(
            Prediction(
                label=decision.labels[row] if tell else None,
                class_index=class_index if tell else None,
                probabilities=decision.probabilities[row].tolist()
                if tells_probabilities and class_index >= 0
                else None,
                verdict=verdict,
                alert_id=alert_ids[row],
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
        default=gateway.repository.is_default(served),
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
