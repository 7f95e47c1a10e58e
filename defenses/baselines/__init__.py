"""Published defenses to compare with, put together of the same parts: a purifier, a detector, a threshold."""

from defenses.baselines.fit import FittedBaseline, check_feasible, fit_baseline
from defenses.baselines.methods import METHODS, BaselineConfig, MethodUnknown
from defenses.baselines.options import OptionForeign, OptionOutOfRange
from defenses.baselines.plan import BaselinePlan

__all__ = [
    "METHODS",
    "BaselineConfig",
    "BaselinePlan",
    "FittedBaseline",
    "MethodUnknown",
    "OptionForeign",
    "OptionOutOfRange",
    "check_feasible",
    "fit_baseline",
]
