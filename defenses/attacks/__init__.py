"""Attacks by name, behind one interface: model, x, y -> x_adv."""

from defenses.attacks.attack import Attack, Facts
from defenses.attacks.examples import AdversarialExamples, Form, craft, fools
from defenses.attacks.kept import craft_once
from defenses.attacks.registry import ATTACKS, AttackUnknown, attack

__all__ = [
    "ATTACKS",
    "AdversarialExamples",
    "Attack",
    "AttackUnknown",
    "Facts",
    "Form",
    "attack",
    "craft",
    "craft_once",
    "fools",
]
