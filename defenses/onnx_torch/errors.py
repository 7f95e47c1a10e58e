"""What can be wrong with a graph that is to run on torch."""

from collections.abc import Sequence
from typing import NamedTuple


class Unsupported(NamedTuple):
    """One node that cannot run: its operator, domain, opset and name, and why."""

    operator: str
    domain: str
    opset: int
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} (domain {self.domain}, opset {self.opset}, node {self.node!r}): {self.reason}"


class OperatorUnsupported(NotImplementedError):
    """A graph uses operators, or forms of them, that have no torch counterpart here; all of them are in ``nodes``."""

    def __init__(self, nodes: Sequence[Unsupported]) -> None:
        self.nodes = tuple(nodes)
        super().__init__(f"The graph cannot run on torch because of {'; '.join(map(str, nodes))}.")


class GraphInvalid(ValueError):
    """A graph is malformed, or its weights are not in memory."""


class ValueNotFound(KeyError):
    """A graph has no value of the requested name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(name)

    def __str__(self) -> str:
        return f"The graph has no value named {self.name!r}."
