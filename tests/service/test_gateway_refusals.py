"""Every bad input gets the right status and one sentence, and the gateway goes on answering."""

import json
import struct
import zlib
from typing import Any

import httpx
import numpy as np
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def refused(visitor, answer: httpx.Response, status: int, *told: str) -> None:
    """The answer is an error of the one shape there is, and the next request is served."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    sentence = body["error"]
    assert sentence[0].isupper() or sentence[0].isdigit() or sentence.startswith(("query.", "path."))
    assert sentence.endswith(".")
    assert not sentence.endswith("..")
    assert "Traceback" not in sentence
    for part in told:
        assert part in sentence
    good = await visitor.infer("digits", np.zeros((1, 1, 16, 16), np.uint8))
    assert good.status_code == 200, good.text


def png(width: int, height: int, content: bytes, depth: int = 8, colour: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda file: b"", "nothing came"),
        (lambda file: b"no image at all", "A PNG, JPEG or WebP image was expected"),
        (lambda file: b"GIF89a" + bytes(20), "A PNG, JPEG or WebP image was expected"),
        (lambda file: file[:60], "damaged or truncated"),
        (lambda file: file[: len(file) * 2 // 3], "damaged or truncated"),
        (lambda file: file[:50] + b"\x00\xff" * 8 + file[66:], "damaged or truncated"),
        (lambda file: png(16, 17, zlib.compress(bytes(17 * 17))), "16 pixels wide and 16 high"),
        (lambda file: png(16, 16, zlib.compress(bytes(33 * 16)), colour=4), "transparent"),
        (lambda file: png(10_000, 10_000, zlib.compress(bytes(10_001), 1)), "at most 25000000 pixels"),
        (lambda file: png(2**31 - 1, 2**31 - 1, zlib.compress(b"")), "at most 25000000 pixels"),
    ],
    ids=["empty", "text", "gif", "header cut", "end cut", "damaged", "size", "transparent", "bomb", "absurd"],
)
async def test_a_body_that_is_no_usable_image_is_refused(visitor, dark, file_of, make, told):
    await refused(visitor, await visitor.predict("digits", make(file_of(dark(1)[0]))), 400, told)


def form(*parts: tuple[str, bytes], end: bytes = b"--edge--\r\n") -> dict[str, Any]:
    body = b"".join(
        b"--edge\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"
        for disposition, data in parts
    )
    return {"content": body + end, "headers": {"content-type": "multipart/form-data; boundary=edge"}}


FILE, TEXT = 'name="image"; filename="a.png"', 'name="image"'


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda file: form(), "The form holds no image"),
        (lambda file: form((TEXT, b"hello")), "Form field 'image' is text"),
        (lambda file: form((FILE, file), (TEXT, b"hello")), "Form field 'image' is text"),
        (lambda file: form(*[(FILE, file)] * 9), "Too many files"),
        (lambda file: form(*[(TEXT, b"hello")] * 9), "Too many fields"),
        (lambda file: form((FILE, file), (FILE, file), end=b""), "truncated"),
        (lambda file: form((FILE, file), (FILE, file[:40]), end=b""), "truncated"),
        (lambda file: form((FILE, file), (FILE, b"no image")), "Image 1 (a.png): A PNG"),
        (lambda file: form((FILE, b"")), "nothing came"),
        (lambda file: form(("", file)), "The form cannot be read"),
        (lambda file: {**form((FILE, file)), "headers": {"content-type": "multipart/form-data"}}, "Missing boundary"),
        (lambda file: {"content": b"--", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form"),
        (lambda file: {"content": file, "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form"),
    ],
)
async def test_a_form_that_is_not_images_only_is_refused(visitor, dark, file_of, make, told):
    request = make(file_of(dark(1)[0]))
    await refused(visitor, await visitor.http.post("/v1/models/digits/predict", **request), 400, told)


GOOD = np.full((2, 1, 16, 16), 0.25, np.float32)


def with_value(value: float) -> np.ndarray:
    tensor = GOOD.copy()
    tensor[1, 0, 3, 5] = value
    return tensor


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (with_value(np.nan), "must be finite"),
        (with_value(np.inf), "must be finite"),
        (with_value(-np.inf), "must be finite"),
        (with_value(1.001), "must be in [0, 1]"),
        (with_value(-0.001), "must be in [0, 1]"),
        (GOOD * 255, "must be in [0, 1]"),
        (GOOD[0], "must have the shape (N, 1, 16, 16)"),
        (GOOD.transpose(0, 2, 3, 1), "must have the shape (N, 1, 16, 16)"),
        (GOOD.repeat(3, 1), "must have the shape (N, 1, 16, 16)"),
        (GOOD[:, :, :15], "must have the shape (N, 1, 16, 16)"),
        (GOOD[:0], "1 to 8 images, not 0"),
        (np.zeros((9, 1, 16, 16), np.uint8), "1 to 8 images, not 9"),
    ],
)
@pytest.mark.parametrize("binary", [True, False])
async def test_a_tensor_that_is_no_batch_of_images_is_refused(visitor, tensor, told, binary):
    if not binary and not np.isfinite(tensor).all():
        told = ""  # JSON itself has no such numbers
    await refused(visitor, await visitor.infer("digits", tensor, binary=binary), 400, told)


def message(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 16, 16], "data": [0] * 256}
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (message(datatype="INT64"), "must be FP32 or UINT8, not INT64"),
        (message(datatype="FP16"), "must be FP32 or UINT8, not FP16"),
        (message(datatype="BYTES"), "must be one of"),
        (message(datatype="FP32", data=["0"] * 256), "must be numbers"),
        (message(data=[256] * 256), "UINT8 cannot hold"),
        (message(data=[0] * 255), "must have 256 elements"),
        (message(name="picture"), "Expected one input named 'image', got 'picture'"),
        (message(shape=[1, -1, 16, 16]), "shape"),
        ({"inputs": [*message()["inputs"], *message(name="other")["inputs"]]}, "got 'image', 'other'"),
        ({"inputs": []}, "an empty list"),
        ({}, "must have 'inputs'"),
        ([], "must be a JSON object"),
        (message() | {"outputs": [{"name": "feelings"}]}, "No output 'feelings' is computed here"),
        (message() | {"outputs": "label"}, "must be a list"),
        (message() | {"id": 7}, "must be a string"),
        (message(parameters={"shared_memory_region": "x"}), "Shared memory"),
    ],
)
async def test_a_message_that_breaks_the_protocol_is_refused(visitor, body, told):
    answer = await visitor.http.post("/v2/models/digits/infer", json=body)
    await refused(visitor, answer, 400, told)


HEADER = json.dumps(
    {
        "inputs": [
            {
                "name": "image",
                "datatype": "UINT8",
                "shape": [1, 1, 16, 16],
                "parameters": {"binary_data_size": 256},
            }
        ]
    }
).encode()


@pytest.mark.parametrize(
    ("content", "length", "told"),
    [
        (HEADER + bytes(256), None, "is not JSON"),
        (HEADER + bytes(256), "many", "must be a whole number"),
        (HEADER + bytes(256), "-5", "must be a whole number"),
        (HEADER + bytes(256), "9" * 400, "must be a whole number"),
        (HEADER + bytes(256), str(len(HEADER) - 1), "are not JSON"),
        (HEADER + bytes(256), str(len(HEADER) + 1), "are not JSON"),
        (HEADER + bytes(256), "100000", "but the body has"),
        (HEADER + bytes(255), str(len(HEADER)), "255 are left"),
        (HEADER + bytes(257), str(len(HEADER)), "1 bytes more"),
        (HEADER.replace(b"256}", b"255}") + bytes(255), str(len(HEADER)), "must be 256"),
        (b"", None, "is not JSON"),
        (b"\xff\xfe", None, "is not JSON"),
        (b"[" * 100_000, None, "is not JSON"),
        (b"{" + b'"a":{' * 50_000, None, "is not JSON"),
    ],
)
async def test_sizes_that_do_not_fit_the_body_are_refused(visitor, content, length, told):
    headers = {} if length is None else {"Inference-Header-Content-Length": length}
    answer = await visitor.http.post("/v2/models/digits/infer", content=content, headers=headers)
    await refused(visitor, answer, 400, told)


@pytest.mark.parametrize(
    ("method", "path", "status", "told"),
    [
        ("GET", "/", 404, "Not Found: GET /."),
        ("POST", "/v3/models", 404, "Not Found: POST /v3/models."),
        ("POST", "/v2/models/letters/infer", 404, "No model letters is in service"),
        ("POST", "/v2/models/digits/versions/7/infer", 404, "No model digits, version 7, is in service"),
        ("POST", "/v1/models/letters/predict", 404, "No model letters is in service"),
        ("GET", "/v2/models/digits/infer", 405, "Method Not Allowed: GET /v2/models/digits/infer."),
        ("DELETE", "/v2/models/digits", 405, "Method Not Allowed"),
        ("OPTIONS", "/v2/models/digits/infer", 405, "Method Not Allowed"),
        ("OPTIONS", "/nowhere", 404, "Not Found"),
        ("PUT", "/metrics", 405, "Method Not Allowed"),
        ("GET", "/v1/alerts/none", 404, "There is no alert with the id 'none'"),
        ("GET", "/v1/alerts/none/image", 404, "There is no alert with the id 'none'"),
        ("GET", "/v1/alerts?limit=0", 422, "query.limit"),
        ("GET", "/v1/alerts?limit=many", 422, "query.limit"),
        ("GET", "/v1/alerts?after=-1", 422, "query.after"),
        ("GET", f"/v1/alerts?after={2**63}", 422, "query.after"),
        ("GET", "/v1/alerts?version=-1", 422, "query.version"),
        ("GET", f"/v1/alerts?version={2**40}", 422, "query.version"),
        ("GET", "/v1/alerts?minimum_score=nan", 422, "query.minimum_score"),
        ("GET", "/v1/alerts?since=yesterday", 422, "query.since"),
        ("GET", "/v1/alerts?since=2026-01-01T00:00:00", 422, "query.since"),
        ("GET", "/v1/alerts?model=%00", 422, "query.model"),
        ("GET", "/v1/alerts?modle=digits", 422, "query.modle"),
    ],
)
async def test_the_frameworks_own_refusals_have_the_same_shape(visitor, method, path, status, told):
    answer = await visitor.http.request(method, path)
    await refused(visitor, answer, status, told)
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(("path", "status"), [("/v2/health/ready", 405), ("/nowhere", 404)])
async def test_a_head_request_is_refused_like_any_other_but_without_a_body(visitor, path, status):
    answer = await visitor.http.request("HEAD", path)
    assert (answer.status_code, answer.content) == (status, b"")
    assert answer.headers["content-type"] == "application/json"
