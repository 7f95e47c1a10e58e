"""Noise that is drawn beside a graph on the processor."""

import numpy as np
import pytest

from service.engines.onnx_fed import FedGraph, standard_normal
from service.engines.onnx_graph import fix_noise, pruned
from service.engines.onnx_session import open_session

COUNT = 400_000


def test_noise_is_standard_normal_and_independent():
    values = standard_normal(np.random.SFC64(1), COUNT)
    assert values.dtype == np.float32
    assert values.mean() == pytest.approx(0, abs=5 / COUNT**0.5)
    assert values.var() == pytest.approx(1, abs=5 * (2 / COUNT) ** 0.5)
    assert (values**4).mean() == pytest.approx(3, abs=0.08)
    assert np.mean(values > 2) == pytest.approx(0.02275, abs=0.0013)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / COUNT**0.5


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_any_number_of_values_can_be_drawn(count):
    assert standard_normal(np.random.SFC64(), count).shape == (count,)


@pytest.fixture
def graphs(made):
    """The same graph fed with noise and drawing its own, by the noise's scale; what they are asked for."""

    def opened(scale: float):
        path, outputs = made["coophance"].graph, ["logits", "purified"]
        model = pruned(path, outputs)
        fix_noise(model, scale)
        own = open_session(model, path, "cpu", 1)
        fed = FedGraph(model, path, outputs, threads=1)
        return lambda images: (
            fed.feed({"image": images}),
            dict(zip(outputs, own.run(outputs, {"image": images}), strict=True)),
        )

    return opened


def test_fed_noise_moves_images_as_much_as_the_graphs_own(graphs, mixed):
    images = mixed[:1].repeat(300, 0).astype(np.float32) / 255
    fed, own = (values["purified"].reshape(300, -1) for values in graphs(1.0)(images))
    assert fed.std(0).mean() == pytest.approx(own.std(0).mean(), rel=0.05)
    assert np.abs(fed.mean(0) - own.mean(0)).max() < 6 * own.std(0).max() * (2 / 300) ** 0.5
    assert (np.abs(fed[1:] - fed[:-1]).max(1) > 1e-3).all(), "every row has noise of its own"


def test_noise_is_drawn_afresh_for_every_run(graphs, mixed):
    ask, images = graphs(1.0), mixed[:2].astype(np.float32) / 255
    assert np.abs(ask(images)[0]["purified"] - ask(images)[0]["purified"]).max() > 1e-3


def test_without_noise_the_answers_are_the_graphs_own(graphs, mixed):
    fed, own = graphs(0.0)(mixed.astype(np.float32) / 255)
    for name, values in own.items():
        np.testing.assert_allclose(fed[name], values, atol=1e-6)
