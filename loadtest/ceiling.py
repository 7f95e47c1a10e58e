"""The most that a machine does: multiply-adds a second, on the runtime that serves or torch, and bytes a second."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from service.engines import Arithmetic

SIDES = (256, 512, 1024)
GPU_SIDES = (2048, 4096, 8192)
COPIED = 2**26
TURNS = 15
DTYPES: Mapping[Arithmetic, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


@dataclass(frozen=True)
class Ceiling:
    """Multiply-adds per second of products of square matrices, and bytes per second of a copy, read and written."""

    multiply_adds: float
    bytes: float

    def floor(self, multiply_adds: float, moved: float) -> float:
        """Return the seconds below which so much work cannot be done: the longer of what the two limits allow."""
        return max(multiply_adds / self.multiply_adds, moved / self.bytes)


def measure_ceiling(threads: int = 1) -> Ceiling:
    """Measure both in so many threads, by processor time where there is one thread and by the clock otherwise.

    It is the fastest turn that counts, at the size of matrix that is fastest.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    source, target = np.ones(COPIED // 4, np.float32), np.empty(COPIED // 4, np.float32)
    copied = 2 * COPIED / _fastest(lambda: np.copyto(target, source), clock)
    return Ceiling(products_per_second(threads, clock), copied)


def products_per_second(threads: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the multiply-adds of products of square float32 matrices on ONNX Runtime in a second of the clock."""
    return max(_products_of(side, threads, clock) for side in SIDES)


def torch_products_per_second(device: torch.device, arithmetic: Arithmetic) -> float:
    """Return the multiply-adds of products of square matrices on torch in a second, in as many threads as torch has.

    Each product is waited for. ``tf32`` is a GPU's alone.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if arithmetic == "tf32" else "highest")
    try:
        sides = GPU_SIDES if device.type == "cuda" else SIDES
        return max(_torch_products_of(side, device, DTYPES[arithmetic]) for side in sides)
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def _torch_products_of(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.rand(2, side, side, device=device).to(dtype)
    product = torch.empty_like(a)

    def multiply() -> None:
        torch.matmul(a, b, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return side**3 / _fastest(multiply, time.perf_counter)


def _products_of(side: int, threads: int, clock: Callable[[], float]) -> float:
    session = _product(side, threads)
    a, b = (np.random.default_rng(seed).random((side, side), np.float32) for seed in (0, 1))
    return side**3 / _fastest(lambda: session.run(None, {"a": a, "b": b}), clock)


def _fastest(call: Callable[[], object], clock: Callable[[], float]) -> float:
    call()
    times = []
    for _ in range(TURNS):
        start = clock()
        call()
        times.append(clock() - start)
    return min(times)


def _product(side: int, threads: int) -> onnxruntime.InferenceSession:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", tensors[:2], tensors[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
