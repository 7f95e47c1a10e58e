"""A graph run by ONNX Runtime beside its torch form."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto
from torch import Tensor, nn

TOLERANCE = 1e-4
HALF_TOLERANCE = 2e-2
"""For graphs in half precision, which torch computes in full."""


class Parity(NamedTuple):
    """How far two runs of a graph are apart: the largest difference of a logit, and the largest logit."""

    max_abs_difference: float
    scale: float
    batch_sizes: tuple[int, ...]


class ParityBroken(ArithmeticError):
    """The torch form of a graph does not say what ONNX Runtime says of it."""


def check_parity(model: ModelProto, module: nn.Module, *, samples: int = 12, tolerance: float | None = None) -> Parity:
    """Compare a canonical graph in ONNX Runtime (CPU) with ``module``, its torch form, in batches of 1, 2, 3 and so on.

    The ``samples`` images in [0, 1] are flat, smooth, striped and random. Every logit must be finite and the classes
    as many; the difference may be ``tolerance`` times the largest logit, 1e-4 unless told (2e-2 for half precision).
    Raises ``ParityBroken``.
    """
    allowed = tolerance if tolerance is not None else _tolerance(model)
    shape = tuple(dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:])
    images = structured_images((shape[0], shape[1], shape[2]), samples)
    sizes = _batch_sizes(samples)
    runs = session(model)
    difference = scale = 0.0
    for size, end in zip(sizes, np.cumsum(sizes), strict=True):
        batch = images[end - size : end]
        expected, got = run(runs, batch), _torch_logits(module, batch)
        if expected.shape != got.shape:
            raise ParityBroken(f"ONNX Runtime gives logits of shape {expected.shape}, the torch form {got.shape}.")
        if not (np.isfinite(expected).all() and np.isfinite(got).all()):
            raise ParityBroken(f"A batch of {size} gives logits that are not finite.")
        difference = max(difference, float(np.abs(expected - got).max()))
        scale = max(scale, float(np.abs(expected).max()))
    if difference > allowed * scale:
        raise ParityBroken(
            f"The torch form of the graph differs from ONNX Runtime by up to {difference:.3g} in logits of up to "
            f"{scale:.3g}; {allowed:.3g} of that is allowed."
        )
    return Parity(difference, scale, sizes)


def structured_images(shape: tuple[int, int, int], samples: int) -> NDArray[np.float32]:
    """Return images (samples, C, H, W) in [0, 1], always the same: random, ramps, stripes, grey, white, black."""
    generator = np.random.default_rng(0)
    _, height, width = shape
    rows, columns = np.mgrid[0:height, 0:width]
    patterns = (
        lambda: generator.random(shape),
        lambda: np.broadcast_to((rows + columns) / max(height + width - 2, 1), shape),
        lambda: np.broadcast_to((columns // 2) % 2, shape),
        lambda: np.full(shape, 0.5) + generator.normal(0, 0.02, shape),
        lambda: np.ones(shape),
        lambda: np.zeros(shape),
    )
    return np.stack([patterns[place % len(patterns)]() for place in range(samples)]).astype(np.float32)


def session(model: ModelProto) -> Any:
    """Return a session of ONNX Runtime on the CPU that prints nothing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(runs: Any, images: NDArray[np.float32]) -> NDArray[Any]:
    """Return the only output of a session for images (N, C, H, W)."""
    (logits,) = runs.run(None, {runs.get_inputs()[0].name: images})
    result: NDArray[Any] = logits
    return result


def _tolerance(model: ModelProto) -> float:
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    return HALF_TOLERANCE if half else TOLERANCE


def _batch_sizes(samples: int) -> tuple[int, ...]:
    sizes: list[int] = []
    while (left := samples - sum(sizes)) > 0:
        sizes.append(min(len(sizes) + 1, left))
    return tuple(sizes)


def _torch_logits(module: nn.Module, images: NDArray[np.float32]) -> NDArray[Any]:
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        result = module(torch.from_numpy(images).to(device))
    logits: Tensor = result if isinstance(result, Tensor) else result[0]
    return logits.cpu().numpy()
