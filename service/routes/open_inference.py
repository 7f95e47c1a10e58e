"""The Open Inference Protocol v2: health, metadata, infer, repository index."""

import asyncio
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from service.body_limit import read_body
from service.disclosure import DEFAULT_OUTPUTS, OutputName, available_outputs, check_output
from service.gateway import Gateway, ReceivedInput
from service.images import tensor_to_npy, validate_tensor
from service.oip import InferRequest, OipMalformed, OutputTensor, decode_infer, encode_infer
from service.routes.dependencies import GatewayOf, caller_of, gateway_of
from service.schemas import RepositoryEntry
from service.served import ServedModel
from service.verdicts import Decision
from service.version import VERSION

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])

NPY = "application/x-npy"

LARGE_BYTES = 2**16
"""Messages above it are decoded and encoded off the event loop."""

LARGE_VALUES = 2**12
"""So are answers with more values to be written as JSON."""

INFER_BODY = {
    "requestBody": {
        "required": True,
        "description": "An inference request, optionally followed by binary tensors.",
        "content": {"application/json": {}, "application/octet-stream": {}},
    }
}


@router.get("")
async def server_metadata() -> dict[str, Any]:
    """Describe the server."""
    return {"name": "portcullis", "version": VERSION, "extensions": ["binary_tensor_data"]}


@router.get("/health/live")
async def live() -> dict[str, bool]:
    """Say that the server is up."""
    return {"live": True}


@router.get("/health/ready")
async def ready(gateway: GatewayOf, response: Response) -> dict[str, bool]:
    """Say whether the models are loaded; 503 until they are."""
    if not gateway.repository.ready:
        response.status_code = 503
    return {"ready": gateway.repository.ready}


@router.get("/models/{model}")
@router.get("/models/{model}/versions/{version}")
async def model_metadata(gateway: GatewayOf, model: str, version: str | None = None) -> dict[str, Any]:
    """Describe a model's input and outputs."""
    served = gateway.repository.get(model, version)
    shape, classes = served.manifest.input.shape, len(served.manifest.labels)
    tails: dict[OutputName, tuple[str, list[int]]] = {
        "label": ("BYTES", []),
        "class_index": ("INT64", []),
        "verdict": ("BYTES", []),
        "logits": ("FP32", [classes]),
        "probabilities": ("FP32", [classes]),
        "score": ("FP32", []),
        "p_value": ("FP32", []),
        "undefended_class_index": ("INT64", []),
        "purified": ("FP32", list(shape)),
    }
    outputs = available_outputs(served.outputs, gateway.settings.disclosure)
    return {
        "name": served.name,
        "versions": gateway.repository.versions(served.name),
        "platform": served.platform,
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, *shape]}],
        "outputs": [{"name": name, "datatype": tails[name][0], "shape": [-1, *tails[name][1]]} for name in outputs],
    }


@router.get("/models/{model}/ready")
@router.get("/models/{model}/versions/{version}/ready")
async def model_ready(gateway: GatewayOf, model: str, version: str | None = None) -> dict[str, Any]:
    """Say that a model is in service; 404 or 503 when it is not."""
    return {"name": gateway.repository.get(model, version).name, "ready": True}


@router.post("/repository/index")
async def repository_index(gateway: GatewayOf) -> list[RepositoryEntry]:
    """List the models that were asked for, with the reason where one is not available."""
    return [RepositoryEntry.model_validate(state, from_attributes=True) for state in gateway.repository.states()]


@router.post("/models/{model}/infer", openapi_extra=INFER_BODY)
@router.post("/models/{model}/versions/{version}/infer", openapi_extra=INFER_BODY)
async def infer(request: Request, model: str, version: str | None = None) -> Response:
    """Classify one tensor of images: UINT8, or FP32 in [0, 1]; (N, C, H, W)."""
    gateway = gateway_of(request)
    served = gateway.repository.get(model, version)
    caller = caller_of(request)
    with gateway.bodies.room() as room:
        async with gateway.request(served) as timed:
            served.check_room(1)
            body = await read_body(request, gateway.settings.max_body_bytes, room)
            large = len(body) > LARGE_BYTES
            served.check_room(1)
            with gateway.metrics.stage("decode"):
                header_length = request.headers.get("inference-header-content-length")
                if large:
                    with gateway.decoding(served, caller):
                        message, images = await gateway.decoder.run(_decoded, body, header_length, served, gateway)
                else:
                    message, images = _decoded(body, header_length, served, gateway)
                timed.shorten(message.timeout)
                names = _requested(message, served, gateway)
            if not request.headers.get("x-request-id") and message.id:
                caller = caller.known_as(message.id)
            received = [partial(_as_npy, row) for row in message.inputs[0].data]
            decision, alert_ids = await gateway.predict(served, images, received, caller, timed.deadline)
            with gateway.metrics.stage("encode"):
                outputs = [OutputTensor(name, _values(decision, name), binary) for name, binary in names]
                # The alerts' ids, one place a row, when there are any.
                parameters = {"alert_ids": ",".join(id or "" for id in alert_ids)} if any(alert_ids) else None
                answer = served.name, str(served.version), message.id, outputs, parameters
                written = sum(np.size(output.data) for output in outputs if not output.binary)
                apart = large or written > LARGE_VALUES
                encoded = await asyncio.to_thread(encode_infer, *answer) if apart else encode_infer(*answer)
    headers = {**encoded.headers, "x-request-id": caller.request_id}
    return Response(encoded.body, media_type=encoded.media_type, headers=headers)


def _decoded(
    body: bytes, header_length: str | None, served: ServedModel, gateway: Gateway
) -> tuple[InferRequest, np.ndarray]:
    message = decode_infer(body, header_length)
    return message, _image(message, served, gateway)


def _requested(message: InferRequest, served: ServedModel, gateway: Gateway) -> list[tuple[OutputName, bool]]:
    disclosure = gateway.settings.disclosure
    if message.outputs is None:
        available = available_outputs(served.outputs, disclosure)
        return [(name, message.binary_by_default) for name in DEFAULT_OUTPUTS if name in available]
    return [(check_output(wanted.name, served.outputs, disclosure), wanted.binary) for wanted in message.outputs]


def _image(message: InferRequest, served: ServedModel, gateway: Gateway) -> np.ndarray:
    if len(message.inputs) != 1 or message.inputs[0].name != "image":
        names = ", ".join(repr(tensor.name) for tensor in message.inputs) or "none"
        raise OipMalformed(f"Expected one input named 'image', got {names}.")
    tensor = message.inputs[0]
    return validate_tensor(tensor.data, tensor.datatype, served.manifest.input, max_batch=gateway.settings.max_images)


def _values(decision: Decision, name: OutputName) -> np.ndarray | list[str]:
    if name == "label":
        return [label or "" for label in decision.labels]
    if name == "verdict":
        return list(decision.verdicts)
    values: dict[OutputName, np.ndarray | None] = {
        "class_index": decision.class_index,
        "logits": decision.logits,
        "probabilities": decision.probabilities,
        "score": decision.scores,
        "p_value": None if decision.p_values is None else decision.p_values.astype(np.float32),
        "undefended_class_index": decision.undefended_class_index,
        "purified": decision.purified,
    }
    array = values[name]
    assert array is not None, "only outputs that are computed can be requested"
    return array


def _as_npy(row: np.ndarray) -> ReceivedInput:
    return ReceivedInput(tensor_to_npy(row), NPY)
