"""Attacks by name, behind one interface: model, x, y -> x_adv."""

from defenses.attacks.attack import Attack, Facts
from defenses.attacks.examples import AdversarialExamples, Form, craft, fools
from defenses.attacks.kept import craft_once
from defenses.attacks.registry import ATTACKS, AttackUnknown, attack
from defenses.attacks.suitable import AttackUnsuitable, attack_to_fit

__all__ = [
    "ATTACKS",
    "AdversarialExamples",
    "Attack",
    "AttackUnknown",
    "AttackUnsuitable",
    "Facts",
    "Form",
    "attack",
    "attack_to_fit",
    "craft",
    "craft_once",
    "fools",
]
