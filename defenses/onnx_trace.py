"""A torch module written as an ONNX graph."""

import copy
import warnings

import torch
from onnx import ModelProto
from torch import nn

OLDEST_WRITTEN = 18
"""The oldest opset that torch's exporter writes by itself; older ones it converts to, and fails at often."""


class ExportFailed(RuntimeError):
    """A torch module could not be exported to ONNX."""


def export_classifier(module: nn.Module, image_shape: tuple[int, int, int], opset: int = 20) -> ModelProto:
    """Export a classifier of images (N, C, H, W) in [0, 1], in evaluation mode, with a dynamic batch.

    The graph has the input ``image`` and the output ``logits``; the module itself stays as it is. ``opset`` is 18 or
    newer. Raises ``ExportFailed``, and ``ValueError`` for an older opset.
    """
    if opset < OLDEST_WRITTEN:
        raise ValueError(f"Expected an opset of {OLDEST_WRITTEN} or newer, got {opset}.")
    evaluated = copy.deepcopy(module).cpu().eval()
    image = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                evaluated,
                (image,),
                input_names=["image"],
                output_names=["logits"],
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportFailed(f"{type(module).__name__} cannot be exported to ONNX: {reason[0]}") from error
    assert program is not None
    model: ModelProto = program.model_proto
    return model
