"""Graphs bound to buffers: sizes filled up and cut back, noise that is fed and drawn afresh, graphs that cannot be."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from service.engines import GraphUnloadable, OnnxEngine
from service.engines.buckets import bucket_of, buckets_up_to, portions
from service.engines.onnx_bound import BoundGraph
from service.engines.onnx_graph import fix_noise, pruned, random_operators, with_noise_fed
from service.engines.onnx_session import open_session

NOISY = """
<ir_version: 10, opset_import: ["": 18]>
noisy (float[N, 2, 5] image) => (float[N, 2, 5] first, float[N, 10] second) <float two = {2}> {
    drawn = RandomNormalLike (image)
    first = Add(image, drawn)
    flat = Flatten(first)
    other = RandomNormalLike (flat)
    second = Mul(other, two)
}
"""


@pytest.fixture(scope="module")
def coophance(made):
    """Open the CoopHANCE version's graph, bound on the processor, with its noise at a scale."""

    def opened(outputs: tuple[str, ...], scale: float, max_batch: int = 4) -> BoundGraph:
        path = made["coophance"].graph
        model = pruned(path, outputs)
        fix_noise(model, scale)
        return BoundGraph(model, path, outputs, device="cpu", threads=1, max_batch=max_batch, cuda_graphs=False)

    return opened


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> BoundGraph:
    model = onnx.parser.parse_model(NOISY)
    path = tmp_path_factory.mktemp("noisy") / "noisy.onnx"
    return BoundGraph(model, path, ["first", "second"], device="cpu", threads=1, max_batch=8, cuda_graphs=False)


def test_sizes_are_the_powers_of_two_and_the_largest():
    assert [buckets_up_to(most) for most in (1, 2, 6, 8)] == [(1,), (1, 2), (1, 2, 4, 6), (1, 2, 4, 8)]
    assert [bucket_of(count, (1, 2, 4, 6)) for count in (1, 2, 3, 4, 5, 6)] == [1, 2, 4, 4, 6, 6]
    assert [(rows.start, rows.stop) for rows in portions(7, 3)] == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 11])
def test_any_number_of_images_gets_what_the_graph_as_it_was_says_without_noise(made, coophance, mixed, count):
    outputs = made["coophance"].outputs
    images = mixed[:count].astype(np.float32) / 255
    whole = onnxruntime.InferenceSession(made["coophance"].graph, providers=["CPUExecutionProvider"])
    expected = whole.run(outputs, {"image": images, "noise_scale": np.zeros((), np.float32)})
    bound = coophance(outputs, 0.0)
    bound.feed({"image": mixed[-4:].astype(np.float32) / 255})
    values = bound.feed({"image": images})
    for name, wanted in zip(outputs, expected, strict=True):
        assert values[name].dtype == wanted.dtype
        np.testing.assert_allclose(values[name], wanted, atol=1e-5)


def test_noise_is_fed_afresh_for_every_run_and_every_row(coophance, mixed):
    bound = coophance(("purified",), 1.0)
    images = mixed[:1].repeat(4, 0).astype(np.float32) / 255
    first, second = (bound.feed({"image": images})["purified"] for _ in range(2))
    assert (np.abs(first - second).max((1, 2, 3)) > 1e-3).all()
    assert all(np.abs(first[row] - first[row + 1]).max() > 1e-3 for row in range(3))


def test_what_was_answered_stays_as_it_was_when_the_next_batch_is_run(coophance, mixed):
    bound = coophance(("logits",), 0.0)
    first = bound.feed({"image": mixed[:4].astype(np.float32) / 255})["logits"]
    kept = first.copy()
    bound.feed({"image": mixed[-4:].astype(np.float32) / 255})
    np.testing.assert_array_equal(first, kept)


def test_fed_noise_is_standard_normal_and_independent(noisy):
    images = np.zeros((8, 2, 5), np.float32)
    runs = [noisy.feed({"image": images}) for _ in range(500)]
    first = np.stack([run["first"] for run in runs]).reshape(-1, 10)
    second = np.stack([run["second"] for run in runs]).reshape(-1, 10) / 2
    drawn = np.concatenate([first, second], 1)
    # 4,000 draws of 20 values: a mean's standard error is 0.016, a covariance's at most 0.023.
    assert np.abs(drawn.mean(0)).max() < 0.08
    assert np.abs(np.cov(drawn.T) - np.eye(20)).max() < 0.12
    assert abs((np.abs(drawn) > 1.96).mean() - 0.05) < 0.004


def test_fed_noise_moves_answers_as_much_as_the_graphs_own(made, coophance, mixed):
    images = mixed[:2].repeat(32, 0).astype(np.float32) / 255
    graph = made["coophance"].graph
    own = open_session(pruned(graph, ("purified",)), graph, "cpu", 1)
    bound = coophance(("purified",), 1.0, max_batch=64)
    one, other = (
        np.concatenate([purify({"image": images}).reshape(2, 32, -1) for _ in range(6)], 1)
        for purify in (lambda inputs: own.run(["purified"], inputs)[0], lambda inputs: bound.feed(inputs)["purified"])
    )
    deviation = one.std(1).mean(), other.std(1).mean()
    assert deviation[1] == pytest.approx(deviation[0], rel=0.15)
    assert np.abs(one.mean(1) - other.mean(1)).max() < 6 * one.std(1).max() * (2 / 192) ** 0.5


def test_a_second_graph_of_two_inputs_is_bound_as_well(made, mixed):
    one = made["gated"]
    model = pruned(one.correction, ("logits", "corrected"))
    fix_noise(model, 0.0)
    bound = BoundGraph(
        model, one.correction, ("logits", "corrected"), device="cpu", threads=1, max_batch=4, cuda_graphs=False
    )
    purified = mixed[:3].astype(np.float32) / 255
    logits = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    plain = OnnxEngine(one.correction, ("logits", "corrected"), threads=1, noise=False)
    expected = plain.correct(purified, logits)
    values = bound.feed({"purified": purified, "undefended_logits": logits})
    for name, wanted in expected.items():
        np.testing.assert_allclose(values[name], wanted, atol=1e-5)


def test_several_threads_may_ask_at_once(coophance, mixed):
    bound = coophance(("logits",), 0.0)
    images = mixed.astype(np.float32) / 255
    alone = bound.feed({"image": images})["logits"]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda row: bound.feed({"image": images[row : row + 1]})["logits"][0], range(48)))
    np.testing.assert_allclose(np.stack(together), alone, atol=1e-5)


def test_only_noise_that_can_be_fed_is_taken_out(made):
    model = onnx.parser.parse_model(NOISY)
    fed, draws = with_noise_fed(model)
    assert [(draw.name, draw.like) for draw in draws] == [("drawn", "image"), ("other", "flat")]
    assert random_operators(fed) == []
    assert random_operators(model) == ["RandomNormalLike"]
    seeded = onnx.parser.parse_model(NOISY.replace("RandomNormalLike (flat)", "RandomNormalLike <seed = 1.5> (flat)"))
    fed, draws = with_noise_fed(seeded)
    assert [draw.name for draw in draws] == ["drawn"]
    assert random_operators(fed) == ["RandomNormalLike"]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("RandomNormalLike (flat)", "RandomUniformLike (flat)", "standard normal one, got RandomUniformLike"),
        ("flat = Flatten(first)", "flat = Flatten <axis = 0> (first)", "one row for each of 2 images"),
    ],
)
def test_a_graph_that_cannot_be_bound_is_refused_with_the_reason(tmp_path, before, after, told):
    assert before in NOISY
    model = onnx.parser.parse_model(NOISY.replace(before, after))
    with pytest.raises(GraphUnloadable, match=told):
        BoundGraph(
            model, tmp_path / "noisy.onnx", ["first", "second"], device="cpu", threads=1, max_batch=2, cuda_graphs=False
        )


def test_the_noises_scale_becomes_a_constant(made):
    model = pruned(made["coophance"].graph, ("logits",))
    assert [value.name for value in model.graph.input] == ["image", "noise_scale"]
    fix_noise(model, 0.0)
    assert [value.name for value in model.graph.input] == ["image"]
    session = open_session(model, made["coophance"].graph, "cpu", 1)
    image = np.zeros((2, 1, 16, 16), np.float32)
    np.testing.assert_array_equal(session.run(None, {"image": image})[0], session.run(None, {"image": image})[0])
