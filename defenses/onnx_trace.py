"""A torch module written as an ONNX graph."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from onnx import ModelProto
from torch import nn

CHATTY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class ExportFailed(RuntimeError):
    """A torch module could not be exported to ONNX."""


def export_classifier(module: nn.Module, image_shape: tuple[int, int, int], opset: int = 20) -> ModelProto:
    """Export a classifier of images (N, C, H, W) in [0, 1], in evaluation mode, with a dynamic batch.

    The graph has the input ``image`` and the output ``logits``; the module itself stays as it is.
    Raises ``ExportFailed``.
    """
    evaluated = copy.deepcopy(module).cpu().eval()
    image = torch.rand(2, *image_shape, generator=torch.Generator().manual_seed(0))
    try:
        with _silence():
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


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in CHATTY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
