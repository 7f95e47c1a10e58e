"""What can keep a graph from having its gradient written."""

from collections.abc import Sequence

from defenses.onnx_torch.errors import Unsupported


class GradientUnsupported(NotImplementedError):
    """Nodes between the image and the wanted value have no derivative here; they are in ``nodes``."""

    def __init__(self, nodes: Sequence[Unsupported]) -> None:
        self.nodes = tuple(nodes)
        super().__init__(
            f"The gradient cannot be written as forward operations because of {'; '.join(map(str, nodes))}."
        )


class ImageNotReached(ValueError):
    """A value does not depend on the image by any operation that has a gradient."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"Expected {name!r} to depend on the image by operations that have a gradient, it does not.")
