"""The Open Inference Protocol codec, against the protocol's real client."""

import json
import random
import struct

import numpy as np
import pytest
import tritonclient.http as triton

from service.oip import (
    BINARY_MEDIA_TYPE,
    HEADER_LENGTH,
    JSON_MEDIA_TYPE,
    InferRequest,
    OipMalformed,
    OutputTensor,
    RequestedOutput,
    decode_infer,
    encode_infer,
)

NUMPY_OF = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


def client_input(array: np.ndarray, datatype: str, *, binary: bool, name: str = "image") -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def client_body(*inputs: triton.InferInput, **options: object) -> tuple[bytes, int | None]:
    return triton.InferenceServerClient.generate_request_body(list(inputs), **options)


def request(**changes: object) -> bytes:
    """Build a JSON request of one valid input, its fields changed; a field changed to `...` is left out."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [2, 2], "data": [0.0, 0.25, 0.5, 1.0]} | changes
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not ...}]}).encode()


def images(datatype: str = "FP32") -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 2 if datatype == "BOOL" else 100, (2, 3, 4, 5))
    return values.astype(NUMPY_OF[datatype])


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("datatype", NUMPY_OF)
def test_what_the_client_sends_is_decoded_exactly(datatype: str, binary: bool) -> None:
    array = images(datatype)
    decoded = decode_infer(*client_body(client_input(array, datatype, binary=binary)))
    tensor = decoded.inputs[0]
    assert (tensor.name, tensor.datatype, tensor.shape) == ("image", datatype, array.shape)
    assert tensor.data.dtype == array.dtype
    np.testing.assert_array_equal(tensor.data, array)


def test_binary_data_is_a_view_of_the_body() -> None:
    body, header_length = client_body(client_input(images(), "FP32", binary=True))
    decoded = decode_infer(body, header_length)
    assert np.shares_memory(decoded.inputs[0].data, np.frombuffer(body, dtype=np.uint8))


def test_a_body_may_be_a_memoryview_and_the_header_length_text() -> None:
    body, header_length = client_body(client_input(images(), "FP32", binary=True))
    decoded = decode_infer(memoryview(body), f" {header_length} ")
    np.testing.assert_array_equal(decoded.inputs[0].data, images())


def test_several_inputs_share_the_binary_tail_in_their_order() -> None:
    first, second, third = images("INT16"), images("FP32"), images("UINT8")
    body, header_length = client_body(
        client_input(first, "INT16", binary=True, name="a"),
        client_input(second, "FP32", binary=False, name="b"),
        client_input(third, "UINT8", binary=True, name="c"),
    )
    decoded = decode_infer(body, header_length)
    for tensor, expected in zip(decoded.inputs, (first, second, third), strict=True):
        np.testing.assert_array_equal(tensor.data, expected)


def test_id_parameters_and_requested_outputs_are_read() -> None:
    body, header_length = client_body(
        client_input(images(), "FP32", binary=True),
        outputs=[
            triton.InferRequestedOutput("label", binary_data=False),
            triton.InferRequestedOutput("logits", binary_data=True),
        ],
        request_id="abc",
        parameters={"tier": 3},
    )
    decoded = decode_infer(body, header_length)
    assert decoded.id == "abc"
    assert decoded.parameters == {"tier": 3}
    assert decoded.outputs == (RequestedOutput("label", False), RequestedOutput("logits", True))


def test_a_client_that_names_no_outputs_wants_them_binary() -> None:
    decoded = decode_infer(*client_body(client_input(images(), "FP32", binary=True)))
    assert decoded.outputs is None
    assert decoded.binary_by_default


def test_binary_data_output_is_the_default_of_requested_outputs() -> None:
    header = json.loads(request())
    header["parameters"] = {"binary_data_output": True}
    header["outputs"] = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    decoded = decode_infer(json.dumps(header).encode(), None)
    assert decoded.outputs == (RequestedOutput("a", True), RequestedOutput("b", False))
    assert not decode_infer(request(), None).binary_by_default


def test_nested_and_flat_json_are_the_same_rows() -> None:
    array = images()
    flat = request(shape=list(array.shape), data=array.ravel().tolist())
    nested = request(shape=list(array.shape), data=array.tolist())
    for body in (flat, nested):
        np.testing.assert_array_equal(decode_infer(body, None).inputs[0].data, array)


def test_a_batch_of_none_is_decoded() -> None:
    empty = np.zeros((0, 3, 4, 5), dtype=np.float32)
    for binary in (True, False):
        decoded = decode_infer(*client_body(client_input(empty, "FP32", binary=binary)))
        assert decoded.inputs[0].data.shape == empty.shape


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"datatype": "BYTES"}, "must be one of BOOL, .*FP64, not 'BYTES'"),
        ({"datatype": "BF16"}, "not 'BF16'"),
        ({"datatype": ...}, "not None"),
        ({"datatype": ["FP32"]}, r"not \['FP32'\]"),
        ({"name": ...}, r"inputs\[0\] must have a 'name', a string, not null"),
        ({"name": ""}, "not an empty one"),
        ({"name": 3}, "not a number"),
        ({"shape": ...}, "whole numbers from 0, not None"),
        ({"shape": [2, -2]}, r"not \[2, -2\]"),
        ({"shape": [2.0, 2]}, r"not \[2.0, 2\]"),
        ({"shape": [True, 4]}, r"not \[True, 4\]"),
        ({"shape": "2,2"}, "not '2,2'"),
        ({"shape": [2**40, 2**40]}, "larger than any tensor"),
        ({"shape": [0, 2**62, 2**62], "data": []}, "larger than any tensor"),
        ({"shape": [10**4000]}, "larger than any tensor"),
        ({"shape": [1] * 33}, "larger than any tensor"),
        ({"data": ...}, "'data' or 'binary_data_size' must come with the input 'image'; neither came"),
        ({"data": [1.0] * 3}, r"must have 4 elements, as its shape \[2, 2\] says, not 3"),
        ({"data": []}, "must have 4 elements"),
        ({"data": 7}, "must be a list, not a number"),
        ({"data": {"0": 1}}, "must be a list, not an object"),
        ({"data": [[1.0, 2.0], [3.0]]}, r"lists of 2 at depth 1, as its shape \[2, 2\] says, not a list of 1"),
        ({"data": [[1.0, 2.0], 3.0]}, "not a number"),
        ({"data": [[1.0, 2.0]]}, "lists of 2 at depth 0"),
        ({"data": [[[1.0], [2.0]], [[3.0], [4.0]]]}, r"must be numbers, but has \[1.0\]"),
        ({"data": [0, 1, 2, "3"]}, "must be numbers, but has '3'"),
        ({"data": [0, 1, 2, None]}, "but has None"),
        ({"data": [0, 1, 2, True]}, "but has True"),
        ({"data": [0, 1, 2, 1e39]}, "a number that FP32 cannot hold"),
        ({"data": [0, 1, 2, 10**400]}, "a number that FP32 cannot hold"),
        ({"datatype": "UINT8", "data": [0, 1, 2, 256]}, "a number that UINT8 cannot hold"),
        ({"datatype": "UINT8", "data": [0, 1, 2, 0.5]}, "must be whole numbers, but has 0.5"),
        ({"datatype": "UINT64", "data": [0, 1, 2, 2**64]}, "a number that UINT64 cannot hold"),
        ({"datatype": "BOOL", "data": [True, False, True, 1]}, "must be true or false, but has 1"),
        ({"parameters": []}, "must be an object, not a list"),
        ({"parameters": {"binary_data_size": 16}}, "both came"),
        ({"parameters": {"binary_data_size": 16}, "data": ...}, f"needs the {HEADER_LENGTH} header"),
        ({"parameters": {"shared_memory_region": "r", "shared_memory_byte_size": 16}, "data": ...}, "Shared memory"),
    ],
)
def test_a_malformed_input_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(OipMalformed, match=sentence):
        decode_infer(request(**changes), None)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "The body is not JSON"),
        (b"{", "The body is not JSON"),
        (b"\xff\xfe", "The body is not JSON"),
        (b"[" * 100_000, "The body is not JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"{}", "must have 'inputs', a list of at least one tensor, not null"),
        (b'{"inputs": []}', "not an empty list"),
        (b'{"inputs": {}}', "not an object"),
        (b'{"inputs": ["image"]}', r"inputs\[0\] must be an object, not a string"),
        (request().replace(b"1.0", b"NaN"), "The body is not JSON"),
        (request().replace(b"1.0", b"-Infinity"), "The body is not JSON"),
        (request().replace(b"1.0", b"1e400"), "FP32 cannot hold"),
        (request()[:-1] + b', "id": 5}', "id of the request must be a string, not a number"),
        (request()[:-1] + b', "parameters": 5}', "must be an object, not a number"),
        (request()[:-1] + b', "parameters": {"binary_data_output": 1}}', "must be true or false, not a number"),
        (request()[:-1] + b', "outputs": {}}', "must be a list, not an object"),
        (request()[:-1] + b', "outputs": ["label"]}', "must be an object, not a string"),
        (request()[:-1] + b', "outputs": [{"name": "a"}, {"name": "a"}]}', "as an earlier one has"),
        (request()[:-1] + b', "outputs": [{"name": "a", "parameters": {"binary_data": 1}}]}', "must be true or false"),
        (request()[:-1] + b', "outputs": [{"name": "a", "parameters": {"classification": 2}}]}', "not supported"),
        (
            request()[:-1] + b', "outputs": [{"name": "a", "parameters": {"shared_memory_region": "r"}}]}',
            "Shared memory",
        ),
    ],
)
def test_a_malformed_request_is_refused(body: bytes, sentence: str) -> None:
    with pytest.raises(OipMalformed, match=sentence):
        decode_infer(body, None)


@pytest.mark.parametrize("header_length", ["", "x", "-1", -1, "1e2", "0x10", "٣", "9" * 5000, "1 2", 2.5, True])
def test_a_header_length_that_is_no_number_is_refused(header_length: str | int) -> None:
    with pytest.raises(OipMalformed, match="must be a whole number of bytes"):
        decode_infer(request(), header_length)


def test_a_header_length_off_by_any_amount_is_refused() -> None:
    body, header_length = client_body(client_input(images(), "FP32", binary=True))
    assert header_length is not None
    with pytest.raises(OipMalformed, match=f"is {len(body) + 1}, but the body has {len(body)} bytes"):
        decode_infer(body, len(body) + 1)
    for wrong in (0, 1, header_length - 1, header_length + 1, len(body)):
        with pytest.raises(OipMalformed, match="are not JSON"):
            decode_infer(body, wrong)


def test_missing_and_trailing_binary_bytes_are_refused() -> None:
    body, header_length = client_body(client_input(images(), "FP32", binary=True))
    with pytest.raises(OipMalformed, match="must have 480 bytes, but 479 are left"):
        decode_infer(body[:-1], header_length)
    with pytest.raises(OipMalformed, match="The body has 1 bytes more"):
        decode_infer(body + b"\0", header_length)


@pytest.mark.parametrize("size", [15, 17, -16, 16.0, "16", None, True, 2**70])
def test_a_binary_data_size_that_does_not_fit_the_shape_is_refused(size: object) -> None:
    header = request(data=..., parameters={"binary_data_size": size})
    with pytest.raises(OipMalformed, match=r"must be 16, the bytes of \[2, 2\] in FP32"):
        decode_infer(header + bytes(16), len(header))


def test_duplicate_input_names_are_refused() -> None:
    body, header_length = client_body(*(client_input(images(), "FP32", binary=True) for _ in range(2)))
    with pytest.raises(OipMalformed, match=r"inputs\[1\] has the name 'image', as an earlier one has"):
        decode_infer(body, header_length)


def test_binary_booleans_other_than_0_and_1_are_refused() -> None:
    header = request(datatype="BOOL", data=..., parameters={"binary_data_size": 4})
    with pytest.raises(OipMalformed, match="bytes of 0 or 1"):
        decode_infer(header + b"\0\1\2\1", len(header))


def test_an_endless_name_does_not_fill_the_message() -> None:
    with pytest.raises(OipMalformed) as caught:
        decode_infer(request(name="n" * 100_000, datatype="x" * 100_000), None)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("binary", [True, False])
def test_damage_raises_nothing_but_malformed(binary: bool) -> None:
    generator = random.Random(0)
    body, header_length = client_body(
        client_input(images("UINT8"), "UINT8", binary=binary),
        client_input(images("FP32")[:1], "FP32", binary=binary, name="other"),
        outputs=[triton.InferRequestedOutput("label")],
        request_id="abc",
    )
    decoded = refused = 0
    for _ in range(4000):
        damaged = bytearray(body)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(body) if generator.random() < 0.3 else 300)] = generator.randrange(256)
        if generator.random() < 0.3:
            damaged = damaged[: generator.randrange(len(damaged))]
        length = generator.choice([header_length, header_length, header_length, None, generator.randrange(600)])
        try:
            decode_infer(bytes(damaged), length)
            decoded += 1
        except OipMalformed:
            refused += 1
    assert decoded
    assert refused


def outputs(binary: bool) -> list[OutputTensor]:
    generator = np.random.default_rng(1)
    return [
        OutputTensor("label", ["cat", "", "größe"], binary),
        OutputTensor("class_index", np.array([3, -1, 2**40], dtype=np.int64), binary),
        OutputTensor("logits", generator.normal(size=(3, 10)).astype(np.float32), binary),
        OutputTensor("purified", generator.random((3, 3, 8, 8), dtype=np.float32).transpose(0, 1, 3, 2), binary),
        OutputTensor("half", generator.random(3).astype(np.float16), binary),
        OutputTensor("double", generator.random(3), binary),
        OutputTensor("flags", np.array([True, False, True]), binary),
    ]


@pytest.mark.parametrize("binary", [True, False])
def test_the_client_reads_what_is_encoded_exactly(binary: bool) -> None:
    encoded = encode_infer("cifar", "2", "abc", outputs(binary), {"alert_ids": "x"})
    length = encoded.headers.get(HEADER_LENGTH)
    result = triton.InferenceServerClient.parse_response_body(encoded.body, header_length=length)
    assert encoded.media_type == (BINARY_MEDIA_TYPE if binary else JSON_MEDIA_TYPE)
    assert (length is not None) == binary
    response = result.get_response()
    assert (response["model_name"], response["model_version"], response["id"]) == ("cifar", "2", "abc")
    assert response["parameters"] == {"alert_ids": "x"}
    for output in outputs(binary):
        received = result.as_numpy(output.name)
        if isinstance(output.data, np.ndarray):
            assert received.dtype == output.data.dtype
            np.testing.assert_array_equal(received, output.data)
        else:
            assert [text.decode() if binary else text for text in received] == output.data


def test_binary_and_json_outputs_mix_in_one_response() -> None:
    encoded = encode_infer("m", "1", None, [OutputTensor("label", ["a"]), OutputTensor("n", np.arange(3), binary=True)])
    result = triton.InferenceServerClient.parse_response_body(
        encoded.body, header_length=encoded.headers[HEADER_LENGTH]
    )
    assert result.as_numpy("label").tolist() == ["a"]
    assert result.as_numpy("n").tolist() == [0, 1, 2]
    assert "id" not in result.get_response()


def test_binary_strings_have_a_little_endian_length_each() -> None:
    encoded = encode_infer("m", "1", None, [OutputTensor("label", ["cat", "ß"], binary=True)])
    assert encoded.body.endswith(struct.pack("<I3sI2s", 3, b"cat", 2, "ß".encode()))


def test_big_endian_arrays_are_sent_little_endian() -> None:
    encoded = encode_infer("m", "1", None, [OutputTensor("n", np.array([1, 2], dtype=">i4"), binary=True)])
    assert encoded.body.endswith(struct.pack("<2i", 1, 2))


def json_data(data: np.ndarray) -> str:
    body = encode_infer("m", "1", None, [OutputTensor("x", data)]).body.decode()
    return body[body.index('"data":') + 7 : -3]


def test_float32_in_json_has_no_silly_digits() -> None:
    assert json_data(np.array([0.1, 1 / 3, 1e-7, 0], dtype=np.float32)) == "[0.1,0.33333334,1e-07,0.0]"


def test_every_float32_in_json_reads_back_as_itself() -> None:
    bits = np.random.default_rng(2).integers(0, 2**32, 100_000, dtype=np.uint32)
    # The shortest digits of the last one are those of its neighbour to a reader that goes through float64.
    edges = np.array([0, 1, 0x7F7FFFFF, 0x00800000, 0x80000000, 0x15AE43FD], dtype=np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[np.isfinite(values)]
    received = np.array(json.loads(json_data(values)), dtype=np.float32)
    np.testing.assert_array_equal(received.view(np.uint32), values.view(np.uint32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_in_json(value: float) -> None:
    with pytest.raises(ValueError, match="'logits' has a number that is not finite"):
        encode_infer("m", "1", None, [OutputTensor("logits", np.array([0, value], dtype=np.float32))])


def test_an_array_of_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="complex128, which the protocol does not have"):
        encode_infer("m", "1", None, [OutputTensor("z", np.array([1j]))])


def test_a_response_read_as_a_request_is_malformed() -> None:
    encoded = encode_infer("m", "1", None, outputs(True))
    with pytest.raises(OipMalformed, match="must have 'inputs'"):
        decode_infer(encoded.body, encoded.headers[HEADER_LENGTH])


def test_a_decoded_request_cannot_be_changed() -> None:
    decoded: InferRequest = decode_infer(*client_body(client_input(images(), "FP32", binary=True)))
    with pytest.raises(ValueError, match="read-only"):
        decoded.inputs[0].data[0] = 0
