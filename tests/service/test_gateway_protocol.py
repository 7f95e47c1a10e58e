"""The Open Inference Protocol end to end: health, metadata, infer, the repository index."""

import json

import numpy as np
import pytest

from service.engines import OnnxEngine
from service.version import VERSION

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVERY_OUTPUT = {
    "label": ("BYTES", [-1]),
    "class_index": ("INT64", [-1]),
    "verdict": ("BYTES", [-1]),
    "logits": ("FP32", [-1, 4]),
    "probabilities": ("FP32", [-1, 4]),
    "score": ("FP32", [-1]),
    "p_value": ("FP32", [-1]),
    "undefended_class_index": ("INT64", [-1]),
    "purified": ("FP32", [-1, 1, 16, 16]),
}


@pytest.fixture(scope="module")
def alone(store) -> OnnxEngine:
    """The serving version's graph, without a gateway around it."""
    outputs = ["logits", "score", "alert", "undefended_logits", "purified"]
    return OnnxEngine(store / "models" / "digits" / "2" / "model.onnx", outputs, threads=1, noise=False)


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


async def test_the_server_says_what_it_is_and_that_it_is_up(visitor):
    answer = await visitor.http.get("/v2")
    assert answer.json() == {
        "name": "portcullis",
        "version": VERSION,
        "extensions": ["binary_tensor_data"],
    }
    assert (await visitor.http.get("/v2/health/live")).json() == {"live": True}
    assert (await visitor.http.get("/v2/health/ready")).json() == {"ready": True}


@pytest.mark.parametrize("path", ["/v2/models/digits", "/v2/models/digits/versions/2"])
async def test_a_model_describes_its_input_and_every_output(visitor, path):
    answer = (await visitor.http.get(path)).json()
    assert answer["name"] == "digits"
    assert answer["versions"] == ["2"]
    assert answer["platform"] == "onnxruntime_onnx"
    assert answer["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 16, 16]}]
    assert {output["name"]: (output["datatype"], output["shape"]) for output in answer["outputs"]} == EVERY_OUTPUT


async def test_a_bare_classifier_offers_no_output_of_a_defense(visitor):
    answer = (await visitor.http.get("/v2/models/bare")).json()
    assert [output["name"] for output in answer["outputs"]] == [
        "label",
        "class_index",
        "verdict",
        "logits",
        "probabilities",
    ]


@pytest.mark.parametrize("path", ["/v2/models/digits/ready", "/v2/models/digits/versions/2/ready"])
async def test_a_model_in_service_is_ready(visitor, path):
    answer = await visitor.http.get(path)
    assert (answer.status_code, answer.json()) == (200, {"name": "digits", "ready": True})


async def test_the_index_lists_what_is_in_service(visitor):
    answer = await visitor.http.post("/v2/repository/index")
    assert answer.json() == [
        {"name": "bare", "version": "1", "state": "READY", "reason": ""},
        {"name": "digits", "version": "2", "state": "READY", "reason": ""},
        {"name": "fragile", "version": "1", "state": "READY", "reason": ""},
    ]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("as_floats", [True, False])
async def test_every_form_of_a_tensor_gets_what_the_graph_alone_computes(
    visitor, alone, dark, bright, binary, as_floats
):
    pixels = np.concatenate([dark(3), bright(2)])
    expected = alone.predict(unit(pixels))
    sent = unit(pixels) if as_floats else pixels
    answer = await visitor.infer("digits", sent, list(EVERY_OUTPUT), binary=binary)
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert list(outputs) == list(EVERY_OUTPUT)
    for name, (datatype, shape) in EVERY_OUTPUT.items():
        assert (outputs[name]["datatype"], outputs[name]["shape"]) == (datatype, [5, *shape[1:]])
    values = {name: np.array(output["data"]).reshape(output["shape"]) for name, output in outputs.items()}
    np.testing.assert_allclose(values["logits"], expected.logits, atol=1e-4)
    np.testing.assert_allclose(values["score"], expected.scores, atol=1e-4)
    np.testing.assert_allclose(values["purified"], expected.purified, atol=1e-4)
    exponentials = np.exp(expected.logits - expected.logits.max(1, keepdims=True))
    np.testing.assert_allclose(values["probabilities"], exponentials / exponentials.sum(1, keepdims=True), atol=1e-4)
    assert values["class_index"].tolist() == expected.logits.argmax(1).tolist()
    assert values["undefended_class_index"].tolist() == expected.undefended_logits.argmax(1).tolist()
    labels = ("zero", "one", "two", "three")
    assert values["label"].tolist() == [labels[index] for index in expected.logits.argmax(1)]
    assert values["verdict"].tolist() == ["accepted"] * 3 + ["alert"] * 2


async def test_a_request_that_names_no_output_gets_label_class_and_verdict(visitor, dark):
    answer = (await visitor.infer("digits", dark(2))).json()
    assert [output["name"] for output in answer["outputs"]] == ["label", "class_index", "verdict"]
    assert (answer["model_name"], answer["model_version"]) == ("digits", "2")
    assert "id" not in answer
    assert "parameters" not in answer


async def test_binary_outputs_hold_the_same_numbers_as_json(visitor, dark, bright):
    pixels = np.concatenate([dark(2), bright(1)])
    as_json = await visitor.outputs("digits", pixels, list(EVERY_OUTPUT))
    answer = await visitor.infer("digits", pixels, list(EVERY_OUTPUT), parameters={"binary_data_output": True})
    assert answer.headers["content-type"] == "application/octet-stream"
    binary = visitor.read(answer)
    assert list(binary) == list(EVERY_OUTPUT)
    for name, values in as_json.items():
        np.testing.assert_array_equal(binary[name], values, err_msg=name)


async def test_binary_and_json_outputs_mix(visitor, dark):
    pixels = dark(1)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [1, 1, 16, 16], "data": pixels.ravel().tolist()}
    outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "label"}]
    answer = await visitor.http.post("/v2/models/digits/infer", json={"inputs": [tensor], "outputs": outputs})
    found = visitor.read(answer)
    assert found["logits"].shape == (1, 4)
    assert found["label"] == (await visitor.outputs("digits", pixels))["label"]


async def test_nested_data_a_request_id_and_a_version_in_the_path_are_taken(visitor, dark):
    pixels = dark(2)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [2, 1, 16, 16], "data": pixels.tolist()}
    answer = await visitor.http.post("/v2/models/digits/versions/2/infer", json={"id": "a-1", "inputs": [tensor]})
    assert answer.json()["id"] == "a-1"
    assert visitor.read(answer)["label"] == (await visitor.outputs("digits", pixels))["label"]


async def test_an_alert_is_told_by_id_in_its_images_place(visitor, dark, bright):
    pixels = np.concatenate([dark(1), bright(1), dark(1, seed=3)])
    answer = (await visitor.infer("digits", pixels)).json()
    before, alert_id, after = answer["parameters"]["alert_ids"].split(",")
    assert (before, after) == ("", "")
    assert (await visitor.recorded(alert_id))["index"] == 1


async def test_a_tensor_needs_no_content_type(visitor, dark):
    answer = await visitor.infer("digits", dark(1))
    assert "content-type" not in answer.request.headers
    assert answer.status_code == 200


async def test_every_answer_carries_the_request_id(visitor, dark):
    request = visitor.request_of(dark(1))
    given = await visitor.http.post(
        "/v2/models/digits/infer",
        content=request["content"],
        headers={**request["headers"], "X-Request-ID": "mine-1"},
    )
    assert given.headers["x-request-id"] == "mine-1"
    made = await visitor.infer("digits", dark(1))
    assert len(made.headers["x-request-id"]) == 36


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/letters",
        "/v2/models/letters/ready",
        "/v2/models/digits/versions/1",
        "/v2/models/digits/versions/1/ready",
        "/v2/models/digits/versions/latest",
        "/v2/models/digits/versions/02",
        "/v2/models/digits/versions/²",
        f"/v2/models/digits/versions/{'9' * 5000}",
    ],
)
async def test_a_model_or_version_that_is_not_in_service_is_not_found(visitor, path):
    answer = await visitor.http.get(path)
    assert answer.status_code == 404
    assert list(answer.json()) == ["error"]
    assert "is in service; there are: bare, digits, fragile." in answer.json()["error"]


async def test_what_is_protected_and_how_is_listed(visitor):
    models = {model["name"]: model for model in (await visitor.http.get("/v1/models")).json()["models"]}
    digits, bare = models["digits"], models["bare"]
    assert (digits["kind"], digits["version"], digits["mode"], digits["defended"]) == ("coophance", "2", "flag", True)
    assert (digits["threshold"], digits["false_positive_rate_budget"]) == (0.0, 0.05)
    assert digits["false_positive_rate_realised"] == 0.04
    assert digits["input_shape"] == [1, 16, 16]
    assert digits["labels"] == ["zero", "one", "two", "three"]
    assert digits["metrics"] == {"clean_accuracy": 0.9}
    assert len(digits["digest"]) == 64
    assert (bare["kind"], bare["defended"], bare["threshold"]) == ("classifier", False, None)
    assert json.dumps(models).count('"default": true') == 3
