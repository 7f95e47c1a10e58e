"""Bytes to an infer request."""

import math
import re
import reprlib
import sys
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np
from pydantic_core import from_json

from service.oip.messages import DTYPES, HEADER_LENGTH, InferRequest, InputTensor, OipMalformed, RequestedOutput

MAX_RANK = 32

MOST_MICROSECONDS = 2**64 - 1
"""The largest timeout that a request may ask for, as the protocol's integers end."""

_WHOLE_NUMBERS: tuple[frozenset[type], str] = (frozenset({int}), "whole numbers")
_JSON_TYPES: Mapping[str, tuple[frozenset[type], str]] = {
    "b": (frozenset({bool}), "true or false"),
    "f": (frozenset({int, float}), "numbers"),
}


def decode_infer(body: bytes | memoryview, header_length: int | str | None) -> InferRequest:
    """Decode the body of an infer request.

    `header_length` is the value of the Inference-Header-Content-Length header: the bytes of JSON that come before the
    binary tensors; None where the whole body is JSON. Data in JSON may be nested or flat, both row-major.

    Raises OipMalformed for anything the protocol does not allow, and for what is not supported here: BYTES and BF16
    inputs, shared memory, classification.
    """
    view = memoryview(body).cast("B")
    size = len(view) if header_length is None else _header_size(header_length, len(view))
    header = _parse_header(bytes(view[:size]), whole_body=header_length is None)
    request_id = header.get("id")
    if request_id is not None and not isinstance(request_id, str):
        raise OipMalformed(f"The id of the request must be a string, not {_kind(request_id)}.")
    parameters = _parameters_of(header, "the request")
    binary_by_default = _flag(parameters, "binary_data_output", "the request", default=False)
    _check_timeout(parameters)
    inputs = _decode_inputs(header.get("inputs"), view[size:], binary_allowed=header_length is not None)
    outputs = _decode_outputs(header.get("outputs"), binary_by_default=binary_by_default)
    return InferRequest(request_id, inputs, outputs, parameters)


def _header_size(value: int | str, body_size: int) -> int:
    if not re.fullmatch("[0-9]{1,15}", str(value).strip(" ")):
        raise OipMalformed(f"{HEADER_LENGTH} must be a whole number of bytes, not {reprlib.repr(value)}.")
    size = int(value)
    if size > body_size:
        raise OipMalformed(f"{HEADER_LENGTH} is {size}, but the body has {body_size} bytes.")
    return size


def _parse_header(encoded: bytes, *, whole_body: bool) -> dict[str, Any]:
    try:
        header = from_json(encoded, allow_inf_nan=False)
    except ValueError as error:
        where = (
            f"The body is not JSON (with binary tensors after the JSON, the {HEADER_LENGTH} header is needed)"
            if whole_body
            else f"The first {len(encoded)} bytes of the body, the length that {HEADER_LENGTH} gives, are not JSON"
        )
        raise OipMalformed(f"{where}: {error}.") from error
    if not isinstance(header, dict):
        raise OipMalformed(f"The request must be a JSON object, not {_kind(header)}.")
    return header


def _decode_inputs(entries: object, tail: memoryview, *, binary_allowed: bool) -> tuple[InputTensor, ...]:
    if not isinstance(entries, list) or not entries:
        found = "an empty list" if entries == [] else _kind(entries)
        raise OipMalformed(f"The request must have 'inputs', a list of at least one tensor, not {found}.")
    names: set[str] = set()
    inputs = []
    for position, entry in enumerate(entries):
        tensor, tail = _decode_input(entry, _name_of(entry, f"inputs[{position}]", names), tail, binary_allowed)
        inputs.append(tensor)
    if len(tail):
        raise OipMalformed(f"The body has {len(tail)} bytes more than its JSON header and its inputs account for.")
    return tuple(inputs)


def _decode_input(
    entry: Mapping[str, Any], name: str, tail: memoryview, binary_allowed: bool
) -> tuple[InputTensor, memoryview]:
    """Decode one input, and return it with what is left of the binary tail."""
    where = f"the input {reprlib.repr(name)}"
    parameters = _parameters_of(entry, where)
    _refuse_shared_memory(parameters, where)
    datatype = _datatype_of(entry, where)
    shape = _shape_of(entry, where, DTYPES[datatype].itemsize)
    if ("data" in entry) == ("binary_data_size" in parameters):
        found = "both" if "data" in entry else "neither"
        raise OipMalformed(f"Either 'data' or 'binary_data_size' must come with {where}; {found} came.")
    if "data" in entry:
        return InputTensor(name, datatype, shape, _json_data(entry["data"], where, datatype, shape), parameters), tail
    if not binary_allowed:
        raise OipMalformed(f"The 'binary_data_size' of {where} needs the {HEADER_LENGTH} header, which did not come.")
    size = _binary_size(parameters["binary_data_size"], where, datatype, shape, len(tail))
    data = _binary_data(tail[:size], where, datatype).reshape(shape)
    return InputTensor(name, datatype, shape, data, parameters), tail[size:]


def _decode_outputs(entries: object, *, binary_by_default: bool) -> tuple[RequestedOutput, ...] | None:
    if entries is None or entries == []:
        return None
    if not isinstance(entries, list):
        raise OipMalformed(f"The request's 'outputs' must be a list, not {_kind(entries)}.")
    names: set[str] = set()
    outputs = []
    for position, entry in enumerate(entries):
        name = _name_of(entry, f"outputs[{position}]", names)
        where = f"the output {reprlib.repr(name)}"
        parameters = _parameters_of(entry, where)
        _refuse_shared_memory(parameters, where)
        if "classification" in parameters:
            raise OipMalformed(f"The parameter 'classification' of {where} is not supported.")
        outputs.append(RequestedOutput(name, _flag(parameters, "binary_data", where, default=binary_by_default)))
    return tuple(outputs)


def _name_of(entry: object, where: str, taken: set[str]) -> str:
    if not isinstance(entry, dict):
        raise OipMalformed(f"The request's {where} must be an object, not {_kind(entry)}.")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        found = "an empty one" if name == "" else _kind(name)
        raise OipMalformed(f"The request's {where} must have a 'name', a string, not {found}.")
    if name in taken:
        raise OipMalformed(f"The request's {where} has the name {reprlib.repr(name)}, as an earlier one has.")
    taken.add(name)
    return name


def _parameters_of(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = entry.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise OipMalformed(f"The parameters of {where} must be an object, not {_kind(parameters)}.")
    return parameters


def _flag(parameters: Mapping[str, Any], key: str, where: str, *, default: bool) -> bool:
    flag = parameters.get(key, default)
    if not isinstance(flag, bool):
        raise OipMalformed(f"The parameter '{key}' of {where} must be true or false, not {_kind(flag)}.")
    return flag


def _check_timeout(parameters: Mapping[str, Any]) -> None:
    timeout = parameters.get("timeout", 0)
    if type(timeout) is not int or not 0 <= timeout <= MOST_MICROSECONDS:
        raise OipMalformed(
            f"The parameter 'timeout' of the request must be a whole number of microseconds from 0, "
            f"not {reprlib.repr(timeout)}."
        )


def _refuse_shared_memory(parameters: Mapping[str, Any], where: str) -> None:
    if any(key.startswith("shared_memory") for key in parameters):
        raise OipMalformed(f"Shared memory, which {where} refers to, is not supported: data goes in the body.")


def _datatype_of(entry: Mapping[str, Any], where: str) -> str:
    datatype = entry.get("datatype")
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise OipMalformed(f"The datatype of {where} must be one of {', '.join(DTYPES)}, not {reprlib.repr(datatype)}.")
    return datatype


def _shape_of(entry: Mapping[str, Any], where: str, itemsize: int) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
        raise OipMalformed(f"The shape of {where} must be a list of whole numbers from 0, not {reprlib.repr(shape)}.")
    # numpy counts a size of 0 as 1 here: it excuses no absurd size beside it.
    if len(shape) > MAX_RANK or math.prod(max(size, 1) for size in shape) > sys.maxsize // itemsize:
        raise OipMalformed(f"The shape of {where}, {reprlib.repr(shape)}, is larger than any tensor can be.")
    return tuple(shape)


def _binary_size(size: object, where: str, datatype: str, shape: tuple[int, ...], left: int) -> int:
    expected = math.prod(shape) * DTYPES[datatype].itemsize
    if type(size) is not int or size != expected:
        raise OipMalformed(
            f"The 'binary_data_size' of {where} must be {expected}, the bytes of {list(shape)} in {datatype}, "
            f"not {reprlib.repr(size)}."
        )
    if size > left:
        raise OipMalformed(f"The binary data of {where} must have {size} bytes, but {left} are left in the body.")
    return size


def _binary_data(buffer: memoryview, where: str, datatype: str) -> np.ndarray:
    if datatype == "BOOL" and np.any(np.frombuffer(buffer, dtype=np.uint8) > 1):
        raise OipMalformed(f"The BOOL data of {where} must be bytes of 0 or 1, but others came.")
    return np.frombuffer(buffer, dtype=DTYPES[datatype])


def _json_data(data: object, where: str, datatype: str, shape: tuple[int, ...]) -> np.ndarray:
    dtype = DTYPES[datatype]
    values = _flattened(data, where, shape)
    allowed, wanted = _JSON_TYPES.get(dtype.kind, _WHOLE_NUMBERS)
    if not allowed.issuperset(map(type, values)):
        wrong = next(value for value in values if type(value) not in allowed)
        raise OipMalformed(f"The {datatype} data of {where} must be {wanted}, but has {reprlib.repr(wrong)}.")
    unfit = f"The data of {where} has a number that {datatype} cannot hold."
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=dtype)
    except OverflowError as error:
        raise OipMalformed(unfit) from error
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise OipMalformed(unfit)
    return array.reshape(shape)


def _flattened(data: object, where: str, shape: tuple[int, ...]) -> list[Any]:
    """Bring data, nested as `shape` says or already flat, into one row-major list of its elements."""
    if not isinstance(data, list):
        raise OipMalformed(f"The data of {where} must be a list, not {_kind(data)}.")
    if not data or not isinstance(data[0], list):
        if len(data) != math.prod(shape):
            raise OipMalformed(
                f"The data of {where} must have {math.prod(shape)} elements, as its shape {list(shape)} says, "
                f"not {len(data)}."
            )
        return data
    rows: list[Any] = [data]
    for depth, size in enumerate(shape):
        uneven = next((row for row in rows if not isinstance(row, list) or len(row) != size), None)
        if uneven is not None:
            found = f"a list of {len(uneven)}" if isinstance(uneven, list) else _kind(uneven)
            raise OipMalformed(
                f"The nested data of {where} must have lists of {size} at depth {depth}, as its shape {list(shape)} "
                f"says, not {found}."
            )
        rows = list(chain.from_iterable(rows))
    return rows


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else kinds.get(type(value), "a number")
