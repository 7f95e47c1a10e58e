"""CoopHANCE: a Regulator purifies, an Inspector alerts (ISSTA 2023, doi 10.1145/3597926.3598093)."""

from defenses.coophance.augmentation import Augmentation
from defenses.coophance.confusion import ConfusionLayer, FluctuationStatistics, measure_fluctuations
from defenses.coophance.fit import FitPlan, Fitted, LabelledImages, Splits, fit_coophance
from defenses.coophance.inspector import Inspector, InspectorConfig, InspectorReport, fit_inspector
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.coophance.training import TrainedRegulator, TrainingPlan, fit_regulator, steps_in

__all__ = [
    "Augmentation",
    "ConfusionLayer",
    "FitPlan",
    "Fitted",
    "FluctuationStatistics",
    "Inspector",
    "InspectorConfig",
    "InspectorReport",
    "LabelledImages",
    "Regulator",
    "RegulatorConfig",
    "Splits",
    "TrainedRegulator",
    "TrainingPlan",
    "fit_coophance",
    "fit_inspector",
    "fit_regulator",
    "measure_fluctuations",
    "steps_in",
]
