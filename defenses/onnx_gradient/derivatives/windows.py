"""The windows of a convolution or a pool, and the way back from them to what they cover."""

from collections.abc import Sequence
from dataclasses import dataclass

from defenses.onnx_gradient.step import Step
from defenses.onnx_torch.operators.windows import Window


@dataclass(frozen=True)
class Windows:
    """Windows over S spatial axes of ``size``, ``count`` of them along each.

    ``before`` and ``after`` say how far the first and the last window reach out of the input; ``rest`` is what the last
    one leaves uncovered at the end.
    """

    size: tuple[int, ...]
    count: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    reach: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    rest: tuple[int, ...]

    @classmethod
    def of(cls, step: Step, kernel: Sequence[int]) -> "Windows":
        """Read the windows of a node from its attributes and the shapes of its input and output."""
        spatial = range(2, len(step.shape()))
        size = step.sizes(spatial)
        count = tuple(extent for extent in step.output_shape[2:] if extent is not None)
        window = Window.of(step.node, size, kernel)
        spans = [
            (number - 1) * stride + reach - pad
            for number, stride, reach, pad in zip(count, window.strides, window.reach, window.before, strict=True)
        ]
        return cls(
            size,
            count,
            window.kernel,
            window.strides,
            window.dilations,
            window.reach,
            window.before,
            tuple(max(0, span - extent) for span, extent in zip(spans, size, strict=True)),
            tuple(max(0, extent - span) for span, extent in zip(spans, size, strict=True)),
        )

    def scatter(self, step: Step, values: str, weight: str, group: int = 1) -> str:
        """Return (N, I, ...) the sums at each cell of values (N, O, ...) by weights (O, I / group, ...)."""
        return step.write(
            "ConvTranspose",
            values,
            weight,
            strides=self.strides,
            dilations=self.dilations,
            pads=[*self.before, *self.after],
            output_padding=self.rest,
            group=group,
        )
