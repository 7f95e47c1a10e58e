"""CoopHANCE: a Regulator purifies, an Inspector alerts (ISSTA 2023, doi 10.1145/3597926.3598093)."""

from defenses.coophance.augmentation import Augmentation
from defenses.coophance.confusion import ConfusionLayer, Fluctuation, FluctuationStatistics, measure_fluctuations
from defenses.coophance.fit import Fitted, fit_coophance
from defenses.coophance.fusion import Fusion, fit_fusion
from defenses.coophance.inspector import Inspector, InspectorConfig
from defenses.coophance.inspector_fit import InspectorExamples, InspectorReport, fit_inspector
from defenses.coophance.plan import FitPlan, InspectorPlan, RegulatorPlan
from defenses.coophance.regressions import Watched, fit_regressions
from defenses.coophance.regulator import Regulator, RegulatorConfig
from defenses.coophance.selection import Candidate, Selection, select
from defenses.coophance.trainer import TrainingPlan
from defenses.coophance.training import TrainedRegulator, fit_regulator, steps_in

__all__ = [
    "Augmentation",
    "Candidate",
    "ConfusionLayer",
    "FitPlan",
    "Fitted",
    "Fluctuation",
    "FluctuationStatistics",
    "Fusion",
    "Inspector",
    "InspectorConfig",
    "InspectorExamples",
    "InspectorPlan",
    "InspectorReport",
    "Regulator",
    "RegulatorConfig",
    "RegulatorPlan",
    "Selection",
    "TrainedRegulator",
    "TrainingPlan",
    "Watched",
    "fit_coophance",
    "fit_fusion",
    "fit_inspector",
    "fit_regressions",
    "fit_regulator",
    "measure_fluctuations",
    "select",
    "steps_in",
]
