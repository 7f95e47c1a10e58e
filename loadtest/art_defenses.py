"""Defenses of the Adversarial Robustness Toolbox in plain Python in front of the classifier, beside the engines."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from model_store import Fetched
from service.engines import OnnxEngine, outputs_of
from service.served import GRAPH

Preprocess = Callable[[np.ndarray], np.ndarray]
"""Images (N, H, W, C) float32 in [0, 1] in and out."""

BUDGET_SECONDS = 20.0
"""How long one defense may be measured; at least one turn is finished."""


def art_preprocessors() -> Mapping[str, Preprocess]:
    """Return ART's defenses with their own settings, for images with the channels last."""
    from art.defences.preprocessor import FeatureSqueezing, JpegCompression, SpatialSmoothing, TotalVarMin

    defenses = {
        "SpatialSmoothing": SpatialSmoothing(channels_first=False, clip_values=(0.0, 1.0)),
        "JpegCompression": JpegCompression(clip_values=(0.0, 1.0), channels_first=False),
        "FeatureSqueezing": FeatureSqueezing(clip_values=(0.0, 1.0), bit_depth=4),
        "TotalVarMin": TotalVarMin(clip_values=(0.0, 1.0)),
    }
    return {name: (lambda x, defense=defense: defense(x)[0]) for name, defense in defenses.items()}


def art_comparison(
    versions: Mapping[str, Fetched], images: np.ndarray, *, turns: int, told: Callable[[str], None]
) -> dict[str, Any]:
    """Return each defense's milliseconds of processor time per image at batch 1 and 32, and its ratio to bare.

    ``versions`` are the store's by what they are called, among them ``bare``; ``images`` are uint8 (N, C, H, W). A
    version is its engine alone; a defense of ART is its preprocessing and then the bare classifier's engine.
    """
    engines = {name: _predictor(fetched) for name, fetched in versions.items()}
    calls: dict[str, Callable[[np.ndarray], object]] = dict(engines)
    for name, preprocess in art_preprocessors().items():
        calls[f"ART {name}"] = _behind(preprocess, engines["bare"])
    result: dict[str, Any] = {}
    for batch in (1, 32):
        x = np.resize(images, (batch, *images.shape[1:])).astype(np.float32) / np.float32(255)
        told(f"ART's defenses at batch {batch}")
        times = {name: _milliseconds(call, x, turns) / batch for name, call in calls.items()}
        result[str(batch)] = {
            name: {"cpu_milliseconds": each, "over_bare": each / times["bare"]} for name, each in times.items()
        }
    return result


def _predictor(fetched: Fetched) -> Callable[[np.ndarray], object]:
    path = fetched.folder / GRAPH
    present = outputs_of(path)
    return OnnxEngine(path, [name for name in ("logits", "score", "alert") if name in present], threads=1).run


def _behind(preprocess: Preprocess, predict: Callable[[np.ndarray], object]) -> Callable[[np.ndarray], object]:
    def call(x: np.ndarray) -> object:
        prepared = preprocess(np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
        return predict(np.ascontiguousarray(prepared.transpose(0, 3, 1, 2), dtype=np.float32))

    return call


def _milliseconds(call: Callable[[np.ndarray], object], x: np.ndarray, turns: int) -> float:
    """Return the median milliseconds of processor time of one call."""
    call(x[:1])
    times: list[float] = []
    deadline = time.monotonic() + BUDGET_SECONDS
    while len(times) < turns and (not times or time.monotonic() < deadline):
        start = time.process_time()
        call(x)
        times.append(1000 * (time.process_time() - start))
    return statistics.median(times)
