"""Graphs on ONNX Runtime: pruned to what is asked, noisy unless told, on the device that was asked for."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from service.engines import DeviceUnavailable, GraphUnloadable, OnnxEngine, outputs_of, pruned
from service.engines.onnx_session import check_device

FLAG = ["logits", "score", "alert"]
EVERYTHING = [*FLAG, "undefended_logits", "purified"]


@pytest.fixture(scope="module")
def graph(store) -> Path:
    return store / "models" / "digits" / "2" / "model.onnx"


@pytest.fixture
def images(dark, bright) -> np.ndarray:
    return np.concatenate([dark(4), bright(4)]).astype(np.float32) / np.float32(255)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def sabotaged(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The graph with nodes before one output that fail on every run."""
    own = onnx.ModelProto()
    own.CopyFrom(model)
    node = next(node for node in own.graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "sound"
    own.graph.initializer.extend(
        [
            helper.make_tensor("sabotage/data", TensorProto.FLOAT, [2], [0, 0]),
            helper.make_tensor("sabotage/far", TensorProto.FLOAT, [], [5]),
        ]
    )
    own.graph.node.extend(
        [
            helper.make_node("ReduceMean", ["image"], ["sabotage/mean"], keepdims=0),
            helper.make_node("Add", ["sabotage/mean", "sabotage/far"], ["sabotage/beyond"]),
            helper.make_node("Cast", ["sabotage/beyond"], ["sabotage/index"], to=TensorProto.INT64),
            helper.make_node("Gather", ["sabotage/data", "sabotage/index"], ["sabotage/failure"]),
            helper.make_node("Add", ["sound", "sabotage/failure"], [output]),
        ]
    )
    return own


def test_an_engine_gives_what_it_was_asked_for_and_nothing_else(graph, images):
    answers = OnnxEngine(graph, FLAG, threads=1).predict(images)
    assert answers.logits.shape == (8, 4)
    assert answers.scores.shape == (8,)
    assert answers.alerts.tolist() == [False] * 4 + [True] * 4
    assert answers.undefended_logits is None
    assert answers.purified is None
    everything = OnnxEngine(graph, EVERYTHING, threads=1).predict(images)
    assert everything.undefended_logits.shape == (8, 4)
    assert everything.purified.shape == (8, 1, 16, 16)
    assert (everything.purified.min(), everything.purified.max()) >= (0, 0)
    assert everything.purified.max() <= 1


def test_what_no_output_needs_is_not_computed(protected_graph, images, tmp_path):
    path = saved(sabotaged(protected_graph, "undefended_logits"), tmp_path)
    whole = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="out of data bounds"):
        whole.run(["logits"], {"image": images})
    with pytest.raises(Exception, match="out of data bounds"):
        OnnxEngine(path, EVERYTHING, threads=1).predict(images)
    assert OnnxEngine(path, FLAG, threads=1).predict(images).alerts.tolist() == [False] * 4 + [True] * 4


def test_a_pruned_graph_keeps_what_its_outputs_need(graph):
    whole, flag, bare = onnx.load(graph), pruned(graph, FLAG), pruned(graph, ["undefended_logits"])
    assert len(bare.graph.node) < len(flag.graph.node) < len(pruned(graph, EVERYTHING).graph.node)
    kept = {node.name for node in pruned(graph, EVERYTHING).graph.node}
    # Nobody asks for the classes here, and an Inspector without a fusion does not look at the distance.
    assert {node.name for node in whole.graph.node} - kept == {
        *("class_index", "undefended_class_index"),
        *("difference", "flat_difference", "distance"),
    }
    assert [value.name for value in flag.graph.input] == ["image", "noise_scale"]
    assert [value.name for value in bare.graph.input] == ["image"]
    assert not [node.name for node in bare.graph.node if not node.name.startswith("raw/")]
    assert {tensor.name for tensor in bare.graph.initializer} < {tensor.name for tensor in flag.graph.initializer}


def test_the_bare_answer_alone_needs_neither_the_defense_nor_its_noise(protected_graph, images, tmp_path):
    path = saved(sabotaged(protected_graph, "purified"), tmp_path)
    with pytest.raises(Exception, match="out of data bounds"):
        OnnxEngine(path, FLAG, threads=1).predict(images)
    bare = [OnnxEngine(path, ["undefended_logits"], threads=1, noise=noise).run(images) for noise in (True, False)]
    np.testing.assert_array_equal(bare[0]["undefended_logits"], bare[1]["undefended_logits"])
    assert bare[0]["undefended_logits"].shape == (8, 4)


def test_noise_is_drawn_afresh_for_every_run_unless_it_is_off(graph, images):
    noisy, quiet = OnnxEngine(graph, EVERYTHING, threads=1), OnnxEngine(graph, EVERYTHING, threads=1, noise=False)
    first, second = noisy.predict(images), noisy.predict(images)
    assert (np.abs(first.purified - second.purified).max((1, 2, 3)) > 1e-3).all()
    assert np.abs(first.logits - second.logits).max() > 1e-3
    np.testing.assert_array_equal(first.undefended_logits, second.undefended_logits)
    first, second = quiet.predict(images), quiet.predict(images)
    for one, other in zip(first.columns, second.columns, strict=True):
        np.testing.assert_array_equal(one, other)


def test_noise_differs_between_equal_images_of_one_batch(graph, images):
    purified = OnnxEngine(graph, EVERYTHING, threads=1).predict(images[:1].repeat(6, 0)).purified
    assert all(np.abs(purified[row] - purified[row + 1]).max() > 1e-3 for row in range(5))


def test_any_batch_gives_an_image_the_same_answer(graph, images):
    engine = OnnxEngine(graph, EVERYTHING, threads=1, noise=False)
    together = engine.predict(images)
    for row in range(len(images)):
        alone = engine.predict(images[row : row + 1])
        for one, other in zip(alone.columns, together[row : row + 1].columns, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_rows_are_taken_from_every_column(graph, images):
    answers = OnnxEngine(graph, FLAG, threads=1, noise=False).predict(images)
    part = answers[3:5]
    np.testing.assert_array_equal(part.logits, answers.logits[3:5])
    np.testing.assert_array_equal(part.scores, answers.scores[3:5])
    assert part.alerts.tolist() == [False, True]
    assert part.purified is None


def test_a_graph_with_its_weights_in_another_file_is_loaded_and_pruned(protected_graph, graph, images, tmp_path):
    own = onnx.ModelProto()
    own.CopyFrom(protected_graph)
    path = tmp_path / "model.onnx"
    onnx.save_model(own, path, save_as_external_data=True, location="model.onnx.data")
    assert (tmp_path / "model.onnx.data").stat().st_size > 10_000
    for outputs in (FLAG, EVERYTHING):
        answers = OnnxEngine(path, outputs, threads=1, noise=False).predict(images)
        expected = OnnxEngine(graph, outputs, threads=1, noise=False).predict(images)
        np.testing.assert_allclose(answers.logits, expected.logits, atol=1e-5)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(GraphUnloadable, match=r"model\.onnx cannot be run: "):
        OnnxEngine(path, FLAG)


def test_a_graphs_outputs_are_listed(graph):
    assert outputs_of(graph) == {*EVERYTHING, "class_index", "undefended_class_index"}


@pytest.mark.parametrize("content", [None, b"no graph at all", b"\x08\x0a\x3a\x02\x0a\x00"])
def test_a_file_that_holds_no_runnable_graph_is_refused(tmp_path, content):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphUnloadable, match=r"model\.onnx cannot be run: ") as caught:
        OnnxEngine(path, ["logits"])
    assert caught.value.path == path


def test_an_output_that_a_graph_has_not_is_refused(graph):
    with pytest.raises(GraphUnloadable, match="feelings"):
        OnnxEngine(graph, ["logits", "feelings"])


@pytest.fixture
def no_gpu() -> None:
    """Skip where a graph does run on a GPU."""
    try:
        check_device("cuda")
    except DeviceUnavailable:
        return
    pytest.skip("There is a GPU here.")


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_never_replaced_by_the_processor(graph):
    for attempt in (lambda: check_device("cuda"), lambda: OnnxEngine(graph, FLAG, device="cuda")):
        with pytest.raises(DeviceUnavailable, match="Asked to run on cuda, but ONNX Runtime offers only CPU") as caught:
            attempt()
        assert caught.value.device == "cuda"


def test_the_processor_is_always_there():
    check_device("cpu")
