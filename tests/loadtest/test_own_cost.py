from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from loadtest.own_cost import engine_of, own_cost, stage_means
from model_store import Draft, FalsePositiveRate, Fetched, InputSpec, Parent, Store
from service.engines import Answers
from service.metrics import Metrics

IMAGE = ("n", 1, 4, 4)


def graph(nodes: list[onnx.NodeProto], inputs: dict[str, tuple], outputs: dict[str, tuple], **constants) -> bytes:
    def told(values: dict[str, tuple]) -> list[onnx.ValueInfoProto]:
        kinds = {"alert": TensorProto.BOOL}
        return [helper.make_tensor_value_info(k, kinds.get(k, TensorProto.FLOAT), v) for k, v in values.items()]

    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    made = helper.make_graph(nodes, "graph", told(inputs), told(outputs), initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture
def correcting(tmp_path: Path) -> Fetched:
    """A version that alerts bright images and answers them from a second graph: the bare logits, negative."""
    first = graph(
        [
            helper.make_node("Identity", ["image"], ["purified"]),
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("Gather", ["flat", "two"], ["undefended_logits"], axis=1),
            helper.make_node("Identity", ["undefended_logits"], ["logits"]),
            helper.make_node("ReduceMean", ["flat"], ["score"], axes=[1], keepdims=0),
            helper.make_node("Greater", ["score", "half"], ["alert"]),
        ],
        {"image": IMAGE},
        {
            **{"logits": ("n", 2), "score": ("n",), "alert": ("n",), "purified": IMAGE},
            "undefended_logits": ("n", 2),
        },
        two=np.array([0, 1]),
        half=np.float32(0.5),
    )
    second = graph(
        [
            helper.make_node("Neg", ["undefended_logits"], ["logits"]),
            helper.make_node("Sub", ["one", "purified"], ["corrected"]),
        ],
        {"purified": IMAGE, "undefended_logits": ("n", 2)},
        {"logits": ("n", 2), "corrected": IMAGE},
        one=np.float32(1),
    )
    payload = tmp_path / "payload"
    payload.mkdir()
    (payload / "model.onnx").write_bytes(first)
    models = Store.open(tmp_path / "models")
    common = {"input": InputSpec(shape=(1, 4, 4), mode="L", resize="bilinear"), "labels": ("dark", "bright")}
    models.publish("pairs", Draft(kind="classifier", **common), payload)
    parent = Parent(name="pairs", version=1, digest=models.digest("pairs", 1))
    payload.mkdir(exist_ok=True)
    (payload / "model.onnx").write_bytes(first)
    (payload / "correction.onnx").write_bytes(second)
    rate = FalsePositiveRate(budget=0.05, calibrated_on=100, realised=0.0, evaluated_on=100)
    models.publish(
        "pairs", Draft(kind="nip", parent=parent, threshold=0.5, false_positive_rate=rate, **common), payload
    )
    return models.fetch("pairs", 2)


def test_the_engines_part_answers_alerted_images_twice_as_the_gateway_does(correcting, monkeypatch):
    monkeypatch.setenv("PORTCULLIS_THREADS", "no number")
    images = np.stack([np.full((1, 4, 4), value, np.float32) for value in (0.25, 0.75)])
    answers = Answers.of(engine_of(correcting).run(images))
    assert answers.alerts.tolist() == [False, True]
    assert answers.logits.tolist() == [[0.25, 0.25], [-0.75, -0.75]]
    assert answers.purified[:, 0, 0, 0].tolist() == [0.25, 0.25]


def test_a_gateways_own_cost_is_told_beside_its_parts(store, image_set):
    versions = {"bare": Store.open(store / "models").fetch("digits", 1)}
    told = own_cost(store, versions, image_set.clean[:4], requests=20, rounds=2, told=lambda _: None)["bare"]
    assert 0 < told["echo_p50"] < told["gateway_p50"]
    assert told["gateway_p50"] > told["engine"] > 0
    assert len(told["ratios"]) == 2
    assert set(told["stages"]) == {"decode", "queue", "purify_classify_inspect", "encode"}
    assert min(told["stages"].values()) > 0


def test_a_stage_that_never_ran_is_left_out():
    metrics = Metrics()
    for seconds in (0.001, 0.003):
        metrics.stages["decode"].observe(seconds)
    metrics.stages["encode"].observe(0.5)
    assert stage_means(metrics.exposition().decode()) == pytest.approx({"decode": 2.0, "encode": 500.0})
