"""What a forward pass keeps for the backward pass is counted per image."""

import torch
from torch import nn

from defenses.footprint import saved_bytes, weight_bytes


def test_what_every_image_keeps_is_counted_once_and_weights_are_not():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 1000), nn.Sigmoid(), nn.Linear(1000, 10))
    # The linear layers keep their inputs, and the sigmoid its output, which is the second one's input.
    assert saved_bytes(network, torch.rand(1, 3, 8, 8)) == 4 * (192 + 1000)
    assert weight_bytes(network) == 4 * (192 * 1000 + 1000 + 10_000 + 10)


def test_batch_norm_in_training_can_be_counted_on_maps_of_one_value():
    network = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4)).train()
    assert saved_bytes(network, torch.rand(1, 3, 8, 8)) == 4 * (192 + 4)
    assert weight_bytes(network) == sum(t.nbytes for t in network.state_dict().values())


def test_nothing_is_left_of_the_measurement():
    network = nn.Linear(4, 2)
    image = torch.rand(1, 4, 1, 1)
    with torch.no_grad():
        saved_bytes(lambda x: network(x.flatten(1)), image)
    assert network.weight.grad is None
    assert not image.requires_grad
