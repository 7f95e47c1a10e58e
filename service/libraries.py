"""The versions of the libraries that shape a result."""

import platform
from importlib.metadata import PackageNotFoundError, version

RECORDED = (
    "adversarial-robustness-toolbox",
    "foolbox",
    "numpy",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "portcullis",
    "pyautoattack",
    "scikit-learn",
    "scipy",
    "torch",
)


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of those recorded libraries that are installed."""
    versions = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
