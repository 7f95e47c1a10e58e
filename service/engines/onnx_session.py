"""Sessions of ONNX Runtime, on the device that was asked for and on no other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from service.engines.answers import Device
from service.engines.errors import DeviceUnavailable, GraphUnloadable
from service.engines.onnx_graph import noise_graph

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

PROVIDERS: Mapping[Device, list[str]] = {"cpu": [CPU], "cuda": [CUDA, CPU]}


def open_session(
    model: onnx.ModelProto,
    path: Path,
    device: Device,
    threads: int,
    *,
    cuda_graphs: bool = False,
    exact: bool = False,
) -> Any:
    """Return a session for a graph that was read from ``path``, where its weights may lie beside it.

    ``threads`` are those of the computation on the CPU, 0 one for each core. With ``cuda_graphs`` the session captures
    its runs and replays them; with ``exact`` a GPU multiplies in float32 throughout, not in TF32.
    Raises ``GraphUnloadable`` for a graph that the runtime refuses, and ``DeviceUnavailable``.
    """
    check_providers(device, onnxruntime.get_available_providers())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A thread that spins while it waits takes the core that decodes the next image.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    given = {"enable_cuda_graph": str(int(cuda_graphs)), "use_tf32": str(int(not exact))}
    providers = [(name, given if name == CUDA else {}) for name in PROVIDERS[device]]
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    except Exception as error:  # the runtime's own exceptions share no narrower ancestor
        raise GraphUnloadable(path, str(error).strip()) from error
    check_providers(device, session.get_providers())
    return session


def check_device(device: Device) -> None:
    """Raise ``DeviceUnavailable`` unless ONNX Runtime can run a graph on the device."""
    if device == "cpu":
        return
    session = onnxruntime.InferenceSession(noise_graph().SerializeToString(), providers=PROVIDERS[device])
    check_providers(device, session.get_providers())


def check_providers(device: Device, providers: Sequence[str]) -> None:
    """Raise ``DeviceUnavailable`` where the device's own provider is not among those: the runtime falls back."""
    if PROVIDERS[device][0] not in providers:
        raise DeviceUnavailable(device, providers)
