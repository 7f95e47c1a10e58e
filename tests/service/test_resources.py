"""What a fit takes is reckoned before it begins: by hand here, and against what a training step really takes."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from service.fit_size import CoophanceSize, NipSize
from service.resources import DiskTooSmall, MemoryTooSmall, check_disk, check_memory, memory_available

MIB, GIB = 2**20, 2**30

CIFAR = CoophanceSize(
    image_shape=(3, 32, 32),
    fit=50_000,
    validation=2_000,
    test=6_000,
    classes=10,
    attacks=3,
    examples=2_000,
    validation_examples=400,
    test_examples=300,
    negatives=2_000,
    batch_size=128,
    features=16_384,
    regulator_pass=1_700_000,
    classifier_pass=770_000,
    regulator_weights=2_000_000,
    classifier_weights=1_100_000,
    inspector_weights=660_000,
)


def test_the_arithmetic_is_the_one_described():
    assert CIFAR.fitted_on == 3 * 2_400
    assert CIFAR.crafted.size == 3 * 2_700 * (5 * 3072 + 18)
    assert CIFAR.gathered.size == 2_000 * (5 * 3072 + 18)
    assert CIFAR.activations.size == 3 * 2_400 * 4 * 3072 + 2 * 4 * (2_000 + 1_200) * 16_384
    assert CIFAR.training.size == 2 * 128 * 1_700_000 + 16 * 2_000_000
    assert CIFAR.attack.size == 2 * 128 * 770_000 + 1_100_000
    assert CIFAR.kept_examples.size == (3 * 2_700 + 2_000) * (4 * 3072 + 18)


def test_a_data_set_smaller_than_the_plan_counts_for_what_it_has():
    small = replace(CIFAR, fit=100, validation=10, test=20)
    assert small.crafted.size == 3 * 130 * (5 * 3072 + 18)
    assert small.training.size == 2 * 100 * 1_700_000 + 16 * 2_000_000
    assert small.activations.size == 3 * 110 * 4 * 3072 + 2 * 4 * (100 + 60) * 16_384


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"features": 65_536}, "1.6 GiB, is for what the Inspector is fitted on: fewer --examples, or another --layer"),
        ({"batch_size": 1024}, "3.3 GiB, is for a training batch: a smaller --batch-size takes less."),
        ({"classifier_pass": 90 * MIB}, "22.5 GiB, is for a batch under attack: a smaller --batch-size takes less."),
        ({"examples": 40_000, "features": 64}, "1.7 GiB, is for the adversarial examples: fewer --examples take less."),
    ],
    ids=["wide layer", "large batch", "large classifier", "many examples"],
)
def test_too_little_memory_is_told_with_what_takes_the_most_and_what_lowers_it(change, told):
    size = replace(CIFAR, **change)
    with pytest.raises(MemoryTooSmall) as caught:
        check_memory(size, available=100 * MIB)
    error = caught.value
    assert isinstance(error, MemoryError)
    assert error.available == 100 * MIB < error.needed
    assert told in str(error)
    assert "of memory, but only 100.0 MiB are available." in str(error)
    check_memory(size, available=error.needed)
    check_memory(size, available=None)
    with pytest.raises(MemoryTooSmall):
        check_memory(size, available=error.needed - 1)


def test_batches_are_held_against_the_gpus_memory_where_they_are():
    size = replace(CIFAR, batch_size=1024)
    with pytest.raises(MemoryTooSmall, match=r"3\.3 GiB of memory on the GPU, but only 1\.0 GiB"):
        check_memory(size, available=10 * GIB, device_available=GIB)
    check_memory(size, available=GIB, device_available=8 * GIB)
    with pytest.raises(MemoryTooSmall):
        check_memory(size, available=GIB)


def test_a_regulator_that_is_used_again_needs_no_training():
    reused = replace(CIFAR, batch_size=4096, regulator_pass=0)
    assert reused.training.size == 16 * 2_000_000
    with pytest.raises(MemoryTooSmall, match="a batch under attack"):
        check_memory(reused, available=GIB)


def test_too_little_disk_is_told_and_what_is_kept_already_counts(tmp_path, monkeypatch):
    needed = CIFAR.kept_examples.size + CIFAR.kept_weights.size + CIFAR.exported.size
    left = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("service.resources.shutil.disk_usage", lambda folder: left._replace(free=needed - 1))
    with pytest.raises(DiskTooSmall) as caught:
        check_disk(CIFAR, tmp_path, kept=0)
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.needed, error.available) == (needed, needed - 1)
    for part in (f"disk under {tmp_path}", "is for the adversarial examples: fewer --examples take less."):
        assert part in str(error), part
    check_disk(CIFAR, tmp_path, kept=1)
    check_disk(CIFAR, tmp_path, kept=2 * needed)


POOL = NipSize(
    image_shape=(3, 32, 32),
    test=6_000,
    attacks=4,
    test_examples=300,
    batch_size=128,
    candidates=50_000,
    pool=300 * MIB,
    classifier_pass=770_000,
    classifier_weights=1_100_000,
)


def test_the_arithmetic_of_a_pool_is_the_one_described():
    assert POOL.crafted.size == 4 * 300 * (5 * 3072 + 18)
    assert POOL.graph.size == 8 * 300 * MIB + 4 * 1_100_000
    assert POOL.nearest.size == 300 * MIB + 12 * 128 * 50_000 + 1_100_000
    assert POOL.attack.size == 2 * 128 * 770_000 + 1_100_000
    assert replace(POOL, test=20).crafted.size == 4 * 20 * (5 * 3072 + 18)
    assert sum(part.size for part in POOL.stored) == 4 * 300 * (4 * 3072 + 18) + 5 * 300 * MIB + 2 * 1_100_000


def test_too_large_a_pool_is_told_with_what_lowers_it(tmp_path):
    told = r"2\.3 GiB, is for the graph that holds the pool: fewer --candidates, a smaller --eta or --precision float16"
    with pytest.raises(MemoryTooSmall, match=told) as caught:
        check_memory(POOL, available=GIB)
    assert caught.value.needed == 300 * MIB + POOL.crafted.size + POOL.graph.size
    check_memory(POOL, available=caught.value.needed)
    with pytest.raises(MemoryTooSmall, match=r"of memory on the GPU, .* is for the search for the nearest candidates"):
        check_memory(POOL, available=10 * GIB, device_available=100 * MIB)
    check_disk(POOL, tmp_path, kept=10 * GIB)


def test_the_memory_of_this_machine_is_known():
    assert 0 < memory_available() < 2**50


TRAINING_STEP = """
import torch
import torch.nn.functional as F
from pathlib import Path
from defenses.coophance import Regulator, RegulatorConfig
from defenses.footprint import saved_bytes, weight_bytes

def memory(what):
    return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
regulator = Regulator(RegulatorConfig((3, 32, 32))).train()
noise_on = torch.ones(())
each = saved_bytes(lambda x: regulator.reconstruct(x, noise_on), torch.full((1, 3, 32, 32), 0.5))
x = torch.rand(96, 3, 32, 32)
F.binary_cross_entropy_with_logits(regulator.reconstruct(x[:2], noise_on), x[:2]).backward()
before = memory("VmRSS")
for _ in range(2):
    F.binary_cross_entropy_with_logits(regulator.reconstruct(x, noise_on), x).backward()
print(each, weight_bytes(regulator), memory("VmHWM") - before)
"""


def test_a_training_batch_takes_what_is_reckoned():
    printed = subprocess.run([sys.executable, "-c", TRAINING_STEP], capture_output=True, text=True, check=True).stdout
    each, weights, peak = map(int, printed.split())
    reckoned = replace(CIFAR, batch_size=96, regulator_pass=each, regulator_weights=weights).training.size
    assert 0.5 * reckoned < peak < 1.1 * reckoned
