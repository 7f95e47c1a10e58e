"""The machine that a fit or a measurement runs on."""

import os
import platform
from pathlib import Path
from typing import Literal

import torch

DeviceName = Literal["auto", "cpu", "cuda"]


class DeviceMissing(ValueError):
    """A computation was asked for on a device that is not here."""

    def __init__(self, device: str) -> None:
        self.device = device
        super().__init__(f"Asked to run on {device}, but torch finds no such device here.")


def find_device(name: DeviceName) -> torch.device:
    """Return the device of that name, for ``auto`` a GPU where there is one; raises ``DeviceMissing``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceMissing(name)
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def hardware(device: torch.device) -> dict[str, str | int]:
    """Return what a measured time depends on: the platform, the processor, how many of it, and the device."""
    processor = _processor()
    return {
        "platform": platform.platform(),
        "processor": processor,
        "cpus": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
    }


def _processor() -> str:
    """Return the processor's name, which the platform module does not know on Linux."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
