"""Outputs to bytes."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from service.oip.messages import (
    BINARY_MEDIA_TYPE,
    DTYPES,
    HEADER_LENGTH,
    JSON_MEDIA_TYPE,
    Encoded,
    OutputTensor,
)

_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

_DATATYPES: Mapping[str, str] = {dtype.str: datatype for datatype, dtype in DTYPES.items()}


def encode_infer(
    model_name: str,
    model_version: str,
    request_id: str | None,
    outputs: Sequence[OutputTensor],
    parameters: Mapping[str, Any] | None = None,
) -> Encoded:
    """Encode the response to an infer request.

    The body is JSON when no output is binary, otherwise a JSON header followed by the binary outputs in their order.
    Floats in JSON are the shortest that read back as the very same number in their own precision.

    Raises ValueError for a float in JSON that is not finite, and for an array whose dtype the protocol does not have.
    """
    header: dict[str, Any] = {"model_name": model_name, "model_version": model_version}
    if request_id is not None:
        header["id"] = request_id
    if parameters:
        header["parameters"] = dict(parameters)
    header["outputs"] = entries = []
    buffers: list[bytes] = []
    for output in outputs:
        entry, data = _encode_output(output)
        if isinstance(data, bytes):
            entry["parameters"] = {"binary_data_size": len(data)}
            buffers.append(data)
        else:
            entry["data"] = data
        entries.append(entry)
    encoded = _JSON.encode(header).encode()
    if not buffers:
        return Encoded(encoded, JSON_MEDIA_TYPE)
    return Encoded(b"".join([encoded, *buffers]), BINARY_MEDIA_TYPE, {HEADER_LENGTH: str(len(encoded))})


def _encode_output(output: OutputTensor) -> tuple[dict[str, Any], bytes | list[Any]]:
    """Split an output into its entry in the header and its data: bytes for the tail, or a list for the entry."""
    if not isinstance(output.data, np.ndarray):
        texts = list(output.data)
        return {"name": output.name, "datatype": "BYTES", "shape": [len(texts)]}, (
            _length_prefixed(texts) if output.binary else texts
        )
    data = output.data.astype(output.data.dtype.newbyteorder("<"), copy=False)
    datatype = _DATATYPES.get(data.dtype.str)
    if datatype is None:
        raise ValueError(f"The output {output.name!r} has the dtype {data.dtype}, which the protocol does not have.")
    entry = {"name": output.name, "datatype": datatype, "shape": list(data.shape)}
    if output.binary:
        return entry, data.tobytes()
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        raise ValueError(f"The output {output.name!r} has a number that is not finite, which JSON cannot carry.")
    return entry, _json_numbers(data.ravel())


def _length_prefixed(texts: Sequence[str]) -> bytes:
    encoded = [text.encode() for text in texts]
    return b"".join(chain.from_iterable((len(text).to_bytes(4, "little"), text) for text in encoded))


def _json_numbers(flat: np.ndarray) -> list[Any]:
    """List an array's numbers so that `json` writes few digits and any reader gets the very same numbers back."""
    if flat.dtype.kind == "f" and flat.dtype.itemsize < 8:
        shortest = flat.astype("U").astype(np.float64)
        # Readers go through float64, and for a few float32 (7.038531e-26) the shortest digits, rounded twice, miss.
        flat = np.where(shortest.astype(flat.dtype) == flat, shortest, flat)
    numbers: list[Any] = flat.tolist()
    return numbers
