"""A version's checkpoint on torch."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from defenses.checkpoint import CORRECTION
from defenses.classifier import Classifier
from defenses.corrector import Corrector
from defenses.pixels import to_float
from defenses.protected import ProtectedClassifier
from service.engines.answers import Answers, Arithmetic
from service.engines.buckets import buckets_up_to, portions
from service.engines.torch_cuda import IN_FLIGHT, CapturedRuns
from service.engines.torch_outputs import Version, VersionOutputs

ARITHMETIC: Mapping[torch.dtype | None, Arithmetic] = MappingProxyType(
    {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
)

Computation = Callable[[np.ndarray], Sequence[np.ndarray]]


class TorchEngine:
    """Compute a version's outputs, as an ``Engine`` does, on the processor or a GPU.

    ``version`` is in evaluation mode and stays as it is but for the device and the layout of its weights, which become
    channels last. ``outputs``, ``noise`` and ``reduced`` are those of ``VersionOutputs``. On a GPU runs are captured
    for few sizes of batch up to ``max_batch`` and replayed (see ``CapturedRuns``). Raises ``ValueError`` for an output
    that the version has not.
    """

    def __init__(
        self,
        version: Version,
        outputs: Sequence[str],
        *,
        device: torch.device,
        noise: bool = True,
        reduced: torch.dtype | None = None,
        max_batch: int = 32,
    ) -> None:
        self._names = tuple(outputs)
        # A bare classifier is read from its graph, a protected one from its checkpoint.
        self.platform = "pytorch_onnx" if isinstance(version, Classifier) else "pytorch_safetensors"
        self.arithmetic: Arithmetic = ARITHMETIC[reduced]
        self._max_batch = max_batch
        module: VersionOutputs = VersionOutputs(version, outputs, noise=noise, reduced=reduced).eval().to(device)
        # torch's own annotations do not know of the layout.
        self._module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.warm_up_sizes: tuple[int, ...] = (1, max_batch) if max_batch > 1 else (1,)
        self.lanes = 1
        self._compute: Computation = self._on_processor
        if device.type == "cuda":
            classifier = version if isinstance(version, Classifier) else version.classifier
            self.warm_up_sizes = buckets_up_to(max_batch)
            self.lanes = IN_FLIGHT
            self._compute = CapturedRuns(self._module, classifier.image_shape, self.warm_up_sizes, device)

    def predict(self, images: np.ndarray) -> Answers:
        """Return the answers for images; ``logits`` must be among the outputs."""
        return Answers.of(self.run(images))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Return each output by name for images."""
        pieces = [self._compute(images[rows]) for rows in portions(len(images), self._max_batch)]
        if len(pieces) == 1:
            return dict(zip(self._names, pieces[0], strict=True))
        return {name: np.concatenate(parts) for name, *parts in zip(self._names, *pieces, strict=True)}

    @torch.inference_mode()
    def _on_processor(self, images: np.ndarray) -> list[np.ndarray]:
        x = to_float(as_tensor(images)).contiguous(memory_format=torch.channels_last)
        return [values.contiguous().numpy() for values in self._module(x)]


class TorchCorrection:
    """Answer alerted images anew with a protected classifier's corrector, as a ``Correction`` does.

    The derivative that it follows is computed in float32, and no run is captured: alerts are few. Raises ``ValueError``
    for a version without a corrector.
    """

    def __init__(
        self, protected: ProtectedClassifier, *, device: torch.device, noise: bool = True, purified: bool = True
    ) -> None:
        if protected.corrector is None:
            raise ValueError("Expected a protected classifier with a corrector, got one without.")
        self.name = CORRECTION
        self.warm_up_sizes: tuple[int, ...] = (1,)
        protected.to(device)  # the classifier as well, which is no part of the corrector's own
        self._corrector: Corrector = protected.corrector
        self._noise_scale = torch.tensor(float(noise), device=device)
        self._device = device
        self._purified = purified

    @torch.no_grad()
    def correct(self, purified: np.ndarray, undefended_logits: np.ndarray) -> dict[str, np.ndarray]:
        """Return ``logits``, and ``corrected`` where it was asked for, of alerted images."""
        x, logits = (as_tensor(values).to(self._device) for values in (purified, undefended_logits))
        corrected = self._corrector(x, logits, self._noise_scale)
        values = {"logits": corrected.logits.cpu().numpy()}
        return values | ({"corrected": corrected.purified.cpu().numpy()} if self._purified else {})


def as_tensor(values: np.ndarray) -> Tensor:
    """Return a tensor over an array, copied only where the array may not be written."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())
