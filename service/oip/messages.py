"""What the Open Inference Protocol's messages are made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HEADER_LENGTH = "Inference-Header-Content-Length"
JSON_MEDIA_TYPE = "application/json"
BINARY_MEDIA_TYPE = "application/octet-stream"

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}


class OipMalformed(ValueError):
    """A request does not follow the Open Inference Protocol; the message says what was expected and what came."""


@dataclass(frozen=True, slots=True, eq=False)
class InputTensor:
    """One input of a request.

    `data` has `shape` and the little-endian dtype of `datatype`. Sent as binary it is a view of the request's body, so
    read-only where the body is, and perhaps unaligned; sent as JSON it is an array of its own.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output a request asks for, and whether its data is wanted as binary."""

    name: str
    binary: bool


@dataclass(frozen=True, slots=True, eq=False)
class InferRequest:
    """A decoded request. `outputs` is None where the request names none and leaves the choice to the server."""

    id: str | None
    inputs: tuple[InputTensor, ...]
    outputs: tuple[RequestedOutput, ...] | None
    parameters: Mapping[str, Any]

    @property
    def binary_by_default(self) -> bool:
        """Whether an output that the request does not speak of is wanted as binary (`binary_data_output`)."""
        return self.parameters.get("binary_data_output") is True

    @property
    def timeout(self) -> int:
        """The microseconds that the request may take, by its parameter `timeout`; 0 where it sets no bound."""
        microseconds: int = self.parameters.get("timeout", 0)
        return microseconds


@dataclass(frozen=True, slots=True, eq=False)
class OutputTensor:
    """One output to encode: an array of numbers, or a sequence of strings, which becomes BYTES of shape (N,)."""

    name: str
    data: np.ndarray | Sequence[str]
    binary: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded response: the body, its media type, and the headers its reader needs beside Content-Type."""

    body: bytes
    media_type: str
    headers: Mapping[str, str] = field(default_factory=dict)
