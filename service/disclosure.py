"""How much of a decision a client may be told."""

from typing import Literal, get_args

from service.settings import Disclosure

OutputName = Literal[
    "label",
    "class_index",
    "verdict",
    "logits",
    "probabilities",
    "score",
    "p_value",
    "undefended_class_index",
    "purified",
]

DEFAULT_OUTPUTS: tuple[OutputName, ...] = ("label", "class_index", "verdict")

_LEVELS: tuple[Disclosure, ...] = get_args(Disclosure)

_NEEDS: dict[OutputName, Disclosure] = {
    "label": "label",
    "class_index": "label",
    "verdict": "verdict",
    "logits": "probabilities",
    "probabilities": "probabilities",
    "score": "all",
    "p_value": "all",
    "undefended_class_index": "all",
    "purified": "all",
}


_COMPUTED: dict[OutputName, str] = {
    "score": "score",
    "p_value": "p_value",
    "undefended_class_index": "undefended_logits",
    "purified": "purified",
}
"""What has to be computed for an output, where the logits do not do."""


class OutputWithheld(PermissionError):
    """An output exists but clients are not told it."""

    def __init__(self, output: str, disclosure: Disclosure) -> None:
        self.output = output
        super().__init__(f"Output {output!r} is withheld: this gateway discloses {disclosure!r} at most.")


class OutputUnknown(ValueError):
    """An output does not exist, or is not computed for this model."""

    def __init__(self, output: str, available: list[OutputName]) -> None:
        self.output = output
        super().__init__(f"No output {output!r} is computed here; there are {', '.join(available)}.")


def discloses(disclosure: Disclosure, output: OutputName) -> bool:
    """Say whether clients may be told an output."""
    return _LEVELS.index(disclosure) >= _LEVELS.index(_NEEDS[output])


def available_outputs(computed: frozenset[str], disclosure: Disclosure) -> list[OutputName]:
    """Return the outputs that a model offers its clients, in a fixed order.

    ``computed`` are the graph's outputs that are computed for it, and ``p_value`` where that can be told.
    """
    return [
        output for output in _NEEDS if discloses(disclosure, output) and _COMPUTED.get(output, "logits") in computed
    ]


def check_output(output: str, computed: frozenset[str], disclosure: Disclosure) -> OutputName:
    """Return the output's name; raises ``OutputUnknown`` or ``OutputWithheld``."""
    for name in _NEEDS:
        if name == output:
            if not discloses(disclosure, name):
                raise OutputWithheld(output, disclosure)
            if _COMPUTED.get(name, "logits") in computed:
                return name
    raise OutputUnknown(output, available_outputs(computed, disclosure))
