"""A torch module written as an ONNX graph."""

import copy
import warnings
from collections.abc import Mapping

import torch
from onnx import ModelProto
from torch import Tensor, nn

OLDEST_WRITTEN = 18
"""The oldest opset that torch's exporter writes by itself; older ones it converts to, and fails at often."""


class ExportFailed(RuntimeError):
    """A torch module could not be exported to ONNX."""


def export_classifier(module: nn.Module, image_shape: tuple[int, int, int], opset: int = 20) -> ModelProto:
    """Export a classifier of images (N, C, H, W) in [0, 1], in evaluation mode, with a dynamic batch.

    The graph has the input ``image`` and the output ``logits``. Raises as ``export_module`` does.
    """
    image = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    return export_module(module, {"image": image}, "logits", opset)


def export_module(module: nn.Module, inputs: Mapping[str, Tensor], output: str, opset: int) -> ModelProto:
    """Export a module of the named inputs, in evaluation mode; the first axis of each is dynamic, scalars are not.

    ``inputs`` are examples on the CPU with a batch of two or more; the module itself stays as it is. ``opset`` is 18
    or newer. Raises ``ExportFailed``, and ``ValueError`` for an older opset.
    """
    if opset < OLDEST_WRITTEN:
        raise ValueError(f"Expected an opset of {OLDEST_WRITTEN} or newer, got {opset}.")
    evaluated = copy.deepcopy(module).cpu().eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                evaluated,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                opset_version=opset,
                dynamic_shapes=tuple(
                    {0: torch.export.Dim.DYNAMIC} if value.ndim else None for value in inputs.values()
                ),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportFailed(f"{type(module).__name__} cannot be exported to ONNX: {reason[0]}") from error
    assert program is not None
    model: ModelProto = program.model_proto
    return model
