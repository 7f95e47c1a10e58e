"""The attacks that a defense can be fitted to."""

from defenses.attacks.attack import Attack
from defenses.attacks.other_image import OTHER_IMAGE
from defenses.attacks.planted import PLANTED
from defenses.attacks.registry import attack


class AttackUnsuitable(ValueError):
    """No defense can be fitted to an attack; `text` describes it."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(
            "Expected an attack to fit on that changes images until they fool the bare classifier, such as fgsm or "
            f"pgd-stop, got {text!r}, which {reason}."
        )
        self.text = text


def attack_to_fit(text: str) -> Attack:
    """Return the attack that ``text`` describes (see ``attack``), if a defense can be fitted to what it makes.

    It can be run on a bare classifier, makes something of the image that it is given, and is not broken on purpose.
    Raises ``AttackUnknown`` and ``AttackUnsuitable``.
    """
    found = attack(text)
    if found.facts.on == "defense":
        raise AttackUnsuitable(text, "is run on a defense")
    if found.family in OTHER_IMAGE:
        raise AttackUnsuitable(text, "takes another image in place of the one that is attacked")
    if found.family in PLANTED:
        raise AttackUnsuitable(text, "is broken on purpose, for the checks of an evaluation")
    return found
