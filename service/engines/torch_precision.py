"""Half the bits, where a version's answers stay what they are."""

import logging
from collections.abc import Mapping
from types import MappingProxyType

import torch

from defenses.classifier import Classifier
from defenses.onnx_parity import structured_images
from defenses.precision import full_precision, has_bfloat16
from service.engines.torch_outputs import Version, VersionOutputs
from service.settings import Precision

logger = logging.getLogger("portcullis")

DTYPES: Mapping[Precision, torch.dtype | None] = MappingProxyType(
    {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
)

REDUCED: tuple[Precision, ...] = ("fp16", "bf16")
"""The precisions that are tried, the finer one first; the coarser one has the larger range."""

TOLERANCE = 0.02
"""How far a logit or a score may be from that in float32, over the larger of 1 and the largest one."""

SAMPLES = 24


def chosen_precision(asked: Precision, version: Version, name: str, device: torch.device) -> torch.dtype | None:
    """Return what a version is computed in: bfloat16, float16, or None for float32.

    What was asked for is taken. ``auto`` is float32 on the processor, and on a GPU the first of ``REDUCED`` by which
    ``precision_difference`` stays within ``TOLERANCE``; float32 where none does, and the log says so.
    """
    if asked != "auto":
        return DTYPES[asked]
    return None if device.type == "cpu" else within_tolerance(version, name, device)


def within_tolerance(version: Version, name: str, device: torch.device) -> torch.dtype | None:
    """Return the first of ``REDUCED`` that leaves a version's answers what they are, None where none does."""
    differences = {}
    for precision in REDUCED:
        dtype = DTYPES[precision]
        if dtype is None or (dtype == torch.bfloat16 and not has_bfloat16(device)):
            continue
        differences[precision] = precision_difference(version, dtype, device)
        if differences[precision] <= TOLERANCE:
            return dtype
    told = ", ".join(f"{precision} moves its answers by {most:.3g}" for precision, most in differences.items())
    logger.warning("%s is computed in float32: %s; %.3g is allowed.", name, told, TOLERANCE)
    return None


@torch.inference_mode()
def precision_difference(version: Version, reduced: torch.dtype, device: torch.device) -> float:
    """Return the largest difference that a precision makes to logits and scores, over the larger of 1 and the largest.

    It is that over structured images, without noise; infinite where a value is not finite.
    """
    classifier, outputs = (
        (version, ["logits"])
        if isinstance(version, Classifier)
        else (
            version.classifier,
            ["logits", "score"],
        )
    )
    x = torch.from_numpy(structured_images(classifier.image_shape, SAMPLES)).to(device)
    with full_precision():
        full, half = (
            VersionOutputs(version, outputs, noise=False, reduced=dtype).eval().to(device)(x)
            for dtype in (None, reduced)
        )
    differences = [
        (one - other).abs().max() / one.abs().max().clamp_min(1.0) for one, other in zip(full, half, strict=True)
    ]
    return float(torch.stack(differences).nan_to_num(torch.inf).max())
