"""Read and write the Open Inference Protocol v2, its binary tensor data extension included: pure functions on bytes."""

from service.oip.decode import MOST_MICROSECONDS, decode_infer
from service.oip.encode import encode_infer
from service.oip.messages import (
    BINARY_MEDIA_TYPE,
    HEADER_LENGTH,
    JSON_MEDIA_TYPE,
    Encoded,
    InferRequest,
    InputTensor,
    OipMalformed,
    OutputTensor,
    RequestedOutput,
)

__all__ = [
    "BINARY_MEDIA_TYPE",
    "HEADER_LENGTH",
    "JSON_MEDIA_TYPE",
    "MOST_MICROSECONDS",
    "Encoded",
    "InferRequest",
    "InputTensor",
    "OipMalformed",
    "OutputTensor",
    "RequestedOutput",
    "decode_infer",
    "encode_infer",
]
