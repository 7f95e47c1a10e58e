"""Engines: what computes a version's answers, behind one interface."""

from service.engines.answers import FIELDS, Answers, Arithmetic, Correction, Device, Engine
from service.engines.errors import DeviceUnavailable, EngineUnavailable, GraphUnloadable, VersionUnsuitable
from service.engines.onnx_engine import OnnxEngine
from service.engines.onnx_graph import outputs_of, pruned

__all__ = [
    "FIELDS",
    "Answers",
    "Arithmetic",
    "Correction",
    "Device",
    "DeviceUnavailable",
    "Engine",
    "EngineUnavailable",
    "GraphUnloadable",
    "OnnxEngine",
    "VersionUnsuitable",
    "outputs_of",
    "pruned",
]
