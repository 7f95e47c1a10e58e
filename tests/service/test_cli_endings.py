"""What ends a fit before its time is told in a sentence, with the exit status that belongs to it."""

import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from onnx import helper
from safetensors.torch import save_file

from defenses.stages import Stages
from model_store import Draft, InputSpec, Store
from service.cli.endings import DiskExhausted, MemoryExhausted, exhaustion_told, interruptions_told
from service.resources import MemoryTooSmall, Part

FAR_TOO_MUCH = 2**58


def python_memory():
    bytearray(FAR_TOO_MUCH)


def numpy_memory():
    np.empty(FAR_TOO_MUCH, np.uint8)


def torch_memory():
    torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)


def gpu_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total of 11 GiB.")


def cudnn_memory():
    raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")


@pytest.mark.parametrize("exhaust", [python_memory, numpy_memory, torch_memory, gpu_memory, cudnn_memory])
def test_running_out_of_memory_is_told_whatever_library_it_is_in(exhaust):
    with pytest.raises(MemoryExhausted) as caught, exhaustion_told():
        exhaust()
    told = str(caught.value)
    assert told.startswith("The fit ran out of memory: ")
    assert "\n" not in told
    assert "enforce" not in told
    for part in ("No defense was published", "run the same command again", "--batch-size", "--examples"):
        assert part in told, part


def full_device(folder):
    Path("/dev/full").write_bytes(b"x")


def file_of_safetensors(folder):
    save_file({"x": torch.zeros(100_000)}, folder / "x.safetensors")


def stage(folder):
    Stages(folder).save("sample model", {"x": torch.zeros(100_000)})


def graph(folder):
    weight = onnx.numpy_helper.from_array(np.zeros(100_000, np.float32), "w")
    output = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [100_000])
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [output], [weight])), folder / "model.onnx")


def version(folder):
    (folder / "payload").mkdir()
    (folder / "payload" / "model.onnx").touch()
    os.truncate(folder / "payload" / "model.onnx", 20_000)
    draft = Draft(kind="regulator", input=InputSpec(shape=(1, 8, 8), mode="L"), labels=())
    Store.open(folder / "store").publish("digits", draft, folder / "payload")


@pytest.mark.parametrize("fill", [full_device, file_of_safetensors, stage, graph, version])
def test_a_full_disk_is_told_whatever_is_written(fill, tmp_path, files_of_at_most):
    with pytest.raises(DiskExhausted) as caught, files_of_at_most(20_000 - 1), exhaustion_told():
        fill(tmp_path)
    told = str(caught.value)
    assert told.startswith("The disk is full: ")
    assert "No defense was published." in told
    assert told.endswith("run the same command again to go on once there is room.")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("out of memory"),
        RuntimeError("shapes cannot be multiplied"),
        FileNotFoundError(2, "No such file or directory"),
        KeyError("memory"),
        MemoryTooSmall(2, 1, "memory", Part("a training batch", 2, "a smaller --batch-size takes less")),
    ],
)
def test_any_other_error_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, exhaustion_told():
        raise error
    assert caught.value is error


def wait_for(number: signal.Signals, unwound: list[bool]) -> None:
    try:
        while True:
            os.kill(os.getpid(), number)
    except Exception:
        pytest.fail("a library that catches every Exception would swallow the stop")
    finally:
        unwound.append(True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_unwinds_and_ends_with_the_signals_exit_status(number, status, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    unwound: list[bool] = []
    with pytest.raises(typer.Exit) as caught, interruptions_told():
        wait_for(number, unwound)
    assert caught.value.exit_code == status
    assert unwound == [True]
    told = capsys.readouterr().err
    assert f"Stopped by {signal.Signals(number).name}." in told
    assert "run the same command again to go on" in told
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_signals_are_given_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="wrong"), interruptions_told():
        raise ValueError("wrong")
    assert signal.getsignal(signal.SIGTERM) is before
