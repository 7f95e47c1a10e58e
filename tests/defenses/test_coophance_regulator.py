import pytest
import torch

from defenses.coophance import Fluctuation, Regulator, RegulatorConfig

ON, OFF = torch.ones(()), torch.zeros(())
FORMS = {"batch-norm": RegulatorConfig, "plain": RegulatorConfig.plain}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 30), (3, 48, 64)])
def test_purified_images_keep_shape_and_range(form, shape):
    regulator = Regulator(FORMS[form](shape)).eval()
    purified = regulator(torch.rand(2, *shape), ON)
    assert purified.shape == (2, *shape)
    assert purified.min() >= 0
    assert purified.max() <= 1


def test_nine_stages_have_the_published_widths():
    regulator = Regulator(RegulatorConfig.plain((3, 32, 32)))
    down = [stage[-2].out_channels for stage in regulator.down]
    up = [stage[-2].out_channels for stage in regulator.up]
    assert (down, up) == ([16, 32, 64, 128], [128, 64, 32, 16])
    skips = [next(iter(skip.parameters())).shape[0] if list(skip.parameters()) else 0 for skip in regulator.skips]
    assert skips == [0, 2, 4, 8]


def test_eight_confusion_layers_stand_after_down_samplings_and_before_up_samplings():
    regulator = Regulator(RegulatorConfig((3, 32, 32))).eval()
    shapes = []
    for layer in regulator.confusion_layers:
        layer.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[1:])))
    regulator(torch.rand(1, 3, 32, 32), ON)
    down = [(16, 16, 16), (32, 8, 8), (64, 4, 4), (128, 2, 2)]
    assert shapes == [*down, (128, 2, 2), (128, 4, 4), (64, 8, 8), (32, 16, 16)]


def test_confusion_disturbs_only_when_it_is_on():
    regulator = Regulator(RegulatorConfig((3, 32, 32))).eval()
    for layer in regulator.confusion_layers:
        layer.imitate(Fluctuation(torch.zeros_like(layer.mu), torch.ones_like(layer.sigma)))
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(regulator(x, OFF), regulator(x, OFF))
    assert not torch.equal(regulator(x, ON), regulator(x, ON))
    regulator.set_confusion(False)
    assert torch.equal(regulator(x, ON), regulator(x, OFF))


def test_input_noise_stays_on_at_inference_where_the_form_says_so():
    x = torch.rand(2, 3, 32, 32)
    noisy, quiet = Regulator(RegulatorConfig.plain((3, 32, 32))).eval(), Regulator(RegulatorConfig((3, 32, 32))).eval()
    assert not torch.equal(noisy(x, ON), noisy(x, ON))
    assert torch.equal(noisy(x, OFF), noisy(x, OFF))
    assert torch.equal(quiet(x, ON), quiet(x, OFF))


def test_configuration_survives_json():
    config = RegulatorConfig.plain((1, 28, 28))
    assert RegulatorConfig.from_json(config.as_json()) == config


def test_a_residual_network_leaves_the_image_as_it_is_until_it_is_trained():
    regulator = Regulator(RegulatorConfig((3, 32, 32), output="residual")).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(regulator(x, ON), x)
    torch.nn.init.constant_(regulator.to_image.bias, 2.0)
    assert torch.equal(regulator(x, ON), torch.ones_like(x))


def test_strength_is_the_share_of_the_purified_image():
    regulator = Regulator(RegulatorConfig((3, 32, 32))).eval()
    x = torch.rand(2, 3, 32, 32)
    purified = regulator(x, ON)
    regulator.set_strength(0.25)
    torch.testing.assert_close(regulator(x, ON), 0.75 * x + 0.25 * purified)
    assert regulator.config.strength == 0.25


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_depth_and_widths_are_free(depth):
    config = RegulatorConfig((3, 40, 32), channels=(4,) * depth, skip_channels=(0,) + (2,) * (depth - 1))
    regulator = Regulator(config).eval()
    assert regulator(torch.rand(2, 3, 40, 32), ON).shape == (2, 3, 40, 32)
    assert len(regulator.confusion_layers) == 2 * depth


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"channels": ()}, "at least one stage"),
        ({"channels": (4, 0), "skip_channels": (1, 1)}, "at least one stage, each of a channel or more"),
        ({"skip_channels": (1, 2)}, "a skip width of 0 or more for each of the 4 stages, got \\(1, 2\\)"),
        ({"strength": 0.0}, "a strength above 0 and at most 1, got 0.0"),
    ],
)
def test_structures_that_cannot_be_built_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        RegulatorConfig((3, 32, 32), **wrong)
