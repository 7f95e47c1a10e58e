"""Images as the requests that servers take: a PNG, a binary tensor of the Open Inference Protocol, or its JSON."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from loadtest.connections import Message

Body = Literal["png", "binary", "json"]

RAW = "application/octet-stream"
OUTPUTS = ("class_index", "verdict")


def png(pixels: np.ndarray) -> bytes:
    """Return pixels uint8 (C, H, W), grey or RGB, as a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2)).save(buffer, "PNG")
    return buffer.getvalue()


def png_message(pixels: np.ndarray, path: str) -> Message:
    """Return an image uint8 (C, H, W) as a request whose content is a PNG."""
    return Message(path, (("Content-Type", "image/png"),), png(pixels))


def raw_message(pixels: np.ndarray, path: str) -> Message:
    """Return an image uint8 (C, H, W) as a request whose content is its pixels, channel by channel."""
    return Message(path, (("Content-Type", RAW),), np.ascontiguousarray(pixels).tobytes())


def binary_message(pixels: np.ndarray, path: str, *, name: str = "image", outputs: Sequence[str] = OUTPUTS) -> Message:
    """Return an image uint8 (C, H, W) as an inference request with a binary tensor.

    ``name`` is the input's, ``outputs`` what is asked for; none asks for what the server gives unasked.
    """
    data = np.ascontiguousarray(pixels).tobytes()
    header = json.dumps(_inference(pixels, name, outputs, {"parameters": {"binary_data_size": len(data)}})).encode()
    headers = (("Content-Type", RAW), ("Inference-Header-Content-Length", str(len(header))))
    return Message(path, headers, header + data)


def json_message(pixels: np.ndarray, path: str, *, name: str = "image", outputs: Sequence[str] = OUTPUTS) -> Message:
    """Return an image uint8 (C, H, W) as an inference request with its pixels as JSON numbers."""
    body = _inference(pixels, name, outputs, {"data": pixels.ravel().tolist()})
    return Message(path, (("Content-Type", "application/json"),), json.dumps(body).encode())


def base64_message(pixels: np.ndarray, path: str, *, name: str = "image") -> Message:
    """Return an image uint8 (C, H, W) as an inference request whose input is a PNG in Base64."""
    encoded = base64.b64encode(png(pixels)).decode()
    body = {"inputs": [{"name": name, "datatype": "BYTES", "shape": [1, 1], "data": [encoded]}]}
    return Message(path, (("Content-Type", "application/json"),), json.dumps(body).encode())


def form_message(pixels: np.ndarray, path: str, *, name: str, raw: bool = False) -> Message:
    """Return an image uint8 (C, H, W) as a form with one file in the field ``name``: a PNG, or its pixels ``raw``."""
    boundary = "----------------portcullis"
    disposition = f'Content-Disposition: form-data; name="{name}"; filename="image"'
    file = raw_message(pixels, path) if raw else png_message(pixels, path)
    head = f"--{boundary}\r\n{disposition}\r\n{': '.join(file.headers[0])}\r\n\r\n"
    content = head.encode() + file.content + f"\r\n--{boundary}--\r\n".encode()
    return Message(path, (("Content-Type", f"multipart/form-data; boundary={boundary}"),), content)


def gateway_messages(images: np.ndarray, model: str, body: Body) -> list[Message]:
    """Return images uint8 (N, C, H, W) as requests to a gateway, each of one image."""
    make, route = GATEWAY[body]
    return [make(pixels, route.format(model=model)) for pixels in images]


def _inference(
    pixels: np.ndarray, name: str, outputs: Sequence[str], tensor: Mapping[str, object]
) -> dict[str, object]:
    inputs = [{"name": name, "datatype": "UINT8", "shape": [1, *pixels.shape], **tensor}]
    return {"inputs": inputs, **({"outputs": [{"name": output} for output in outputs]} if outputs else {})}


GATEWAY: Mapping[Body, tuple[Callable[[np.ndarray, str], Message], str]] = {
    "png": (png_message, "/v1/models/{model}/predict"),
    "binary": (binary_message, "/v2/models/{model}/infer"),
    "json": (json_message, "/v2/models/{model}/infer"),
}
"""How each body is made, and the gateway's route for it."""
