"""What the paper interprets NIP by: neuron influence, neuron consistency, its parameters, and where it is added."""

from defenses.nip.studies.activations import PlaceRow, PlaceStudy, activation_perturbations, study_place
from defenses.nip.studies.consistency import (
    ConsistencyRow,
    ConsistencyStudy,
    Correlation,
    study_consistency,
    top_consistency,
)
from defenses.nip.studies.influence import (
    GroupChange,
    InfluenceCurve,
    InfluenceStudy,
    influence_towards,
    study_influence,
)
from defenses.nip.studies.outcomes import Outcome, Share, Success, measure_outcomes, recalibrate
from defenses.nip.studies.subject import StudySubject
from defenses.nip.studies.sweeps import (
    Setting,
    SettingRefused,
    Sweep,
    SweepRow,
    layers_to_try,
    moving_answer,
    study_eta,
    study_k,
    study_layer,
)

__all__ = [
    "ConsistencyRow",
    "ConsistencyStudy",
    "Correlation",
    "GroupChange",
    "InfluenceCurve",
    "InfluenceStudy",
    "Outcome",
    "PlaceRow",
    "PlaceStudy",
    "Setting",
    "SettingRefused",
    "Share",
    "StudySubject",
    "Success",
    "Sweep",
    "SweepRow",
    "activation_perturbations",
    "influence_towards",
    "layers_to_try",
    "measure_outcomes",
    "moving_answer",
    "recalibrate",
    "study_consistency",
    "study_eta",
    "study_influence",
    "study_k",
    "study_layer",
    "study_place",
    "top_consistency",
]
