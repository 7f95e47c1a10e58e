"""A version's graph on ONNX Runtime, pruned to the outputs that are asked of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from onnx.utils import Extractor

Device = Literal["cpu", "cuda"]

PROVIDERS: Mapping[Device, list[str]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}


class GraphUnloadable(ValueError):
    """A graph cannot be run."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        super().__init__(f"{path.name} cannot be run: {reason}")


class DeviceUnavailable(RuntimeError):
    """The device that was asked for is not there, and no other is taken in its place."""

    def __init__(self, device: str, providers: Sequence[str]) -> None:
        self.device = device
        super().__init__(f"Asked to run on {device}, but ONNX Runtime offers only {', '.join(providers)}.")


@dataclass(frozen=True)
class Answers:
    """What a graph says of N images; what was not computed is None.

    ``logits`` and ``undefended_logits`` are (N, K), ``scores`` (N,), ``alerts`` (N,) bool, ``purified`` (N, C, H, W).
    """

    logits: np.ndarray
    scores: np.ndarray | None = None
    alerts: np.ndarray | None = None
    undefended_logits: np.ndarray | None = None
    purified: np.ndarray | None = None

    def __getitem__(self, rows: slice) -> "Answers":
        return Answers(*(None if column is None else column[rows] for column in self.columns))  # type: ignore[arg-type]

    @property
    def columns(self) -> tuple[np.ndarray | None, ...]:
        """The fields in order."""
        return (self.logits, self.scores, self.alerts, self.undefended_logits, self.purified)


FIELDS = {
    "logits": "logits",
    "score": "scores",
    "alert": "alerts",
    "undefended_logits": "undefended_logits",
    "purified": "purified",
}
"""The graph's outputs that an engine can be asked for, and the answers' fields they fill."""


class Engine:
    """Run a graph on batches of images; safe to call from several threads.

    ``outputs`` are names of ``FIELDS``; the graph is pruned to them, since the runtime computes every output that a
    graph declares. Raises ``GraphUnloadable`` for a graph that the runtime refuses and ``DeviceUnavailable`` when
    ``cuda`` is asked for and not given.
    """

    def __init__(
        self,
        path: Path,
        outputs: Sequence[str],
        *,
        device: Device = "cpu",
        threads: int = 0,
        noise: bool = True,
    ) -> None:
        _check_providers(device, onnxruntime.get_available_providers())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # A thread that spins while it waits takes the core that decodes the next image.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            self._session = onnxruntime.InferenceSession(
                pruned(path, outputs).SerializeToString(), options, providers=PROVIDERS[device]
            )
        except Exception as error:  # the runtime's own exceptions share no narrower ancestor
            raise GraphUnloadable(path, str(error).strip()) from error
        _check_providers(device, self._session.get_providers())
        self._outputs = list(outputs)
        has_noise = any(value.name == "noise_scale" for value in self._session.get_overridable_initializers())
        self._fixed = {"noise_scale": np.zeros((), np.float32)} if has_noise and not noise else {}

    def predict(self, images: np.ndarray) -> Answers:
        """Return the answers for images (N, C, H, W) float32 in [0, 1]; ``logits`` must be among the outputs."""
        return Answers(**{FIELDS[name]: values for name, values in self.run(images).items()})

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name for images (N, C, H, W) float32 in [0, 1]."""
        return self.feed(image=images)

    def feed(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name for inputs by name."""
        values = self._session.run(self._outputs, {**inputs, **self._fixed})
        return dict(zip(self._outputs, values, strict=True))


def outputs_of(path: Path) -> set[str]:
    """Return the names of a graph's outputs; raises ``GraphUnloadable`` for a file that holds no graph."""
    try:
        return {value.name for value in onnx.load(path, load_external_data=False).graph.output}
    except Exception as error:  # protobuf's errors and the file system's share no narrower ancestor
        raise GraphUnloadable(path, str(error)) from error


def check_device(device: Device) -> None:
    """Raise ``DeviceUnavailable`` unless a graph can be run on the device."""
    if device == "cpu":
        return
    value, number = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "identity", [value("x", number, [1])], [value("y", number, [1])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=PROVIDERS[device])
    _check_providers(device, session.get_providers())


def _check_providers(device: Device, providers: Sequence[str]) -> None:
    if PROVIDERS[device][0] not in providers:
        raise DeviceUnavailable(device, providers)


def pruned(path: Path, outputs: Sequence[str]) -> onnx.ModelProto:
    """Return a graph without what its named outputs do not need."""
    model = onnx.load(path, load_external_data=False)
    kept = Extractor(model).extract_model([value.name for value in model.graph.input], list(outputs))
    # The noise's scale would be an input that has no default any more, where nothing reads it.
    read = {name for node in kept.graph.node for name in node.input}
    for value in [value for value in kept.graph.input if value.name not in read]:
        kept.graph.input.remove(value)
    return kept
