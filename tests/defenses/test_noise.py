import pytest
import torch

from defenses.noise import gaussian_like


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_standard_normal_and_laid_out_as_its_example(layout, dtype):
    torch.manual_seed(0)
    x = torch.zeros(16, 8, 32, 24, dtype=dtype).to(memory_format=layout)
    noise = gaussian_like(x)
    assert noise.shape == x.shape
    assert noise.dtype == dtype
    assert noise.stride() == x.stride()
    values = noise.float()
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
    # Neighbours in each dimension have nothing to do with each other.
    for dim in range(4):
        length = values.shape[dim]
        product = values.narrow(dim, 0, length - 1) * values.narrow(dim, 1, length - 1)
        assert abs(float(product.mean())) < 0.02


def test_noise_is_drawn_anew_and_follows_the_seed():
    x = torch.zeros(4, 3, 8, 8).to(memory_format=torch.channels_last)
    torch.manual_seed(1)
    first, second = gaussian_like(x), gaussian_like(x)
    torch.manual_seed(1)
    assert torch.equal(gaussian_like(x), first)
    assert not torch.equal(first, second)
