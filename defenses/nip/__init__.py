"""NIP: reclassification after an inverse perturbation (Chen et al., Fight Perturbations with Perturbations)."""

from defenses.nip.amplitude import Strength, Tried, choose_amplitude
from defenses.nip.correction import CorrectionConfig, InverseCorrection, Replaced
from defenses.nip.correction_export import check_correction, export_correction
from defenses.nip.fit import FittedNip, fit_nip
from defenses.nip.gated_fit import FittedGate, GateReport, InspectorMissing, fit_gated, gated_parts
from defenses.nip.gated_plan import GatedPlan
from defenses.nip.head import AutogradHead, ChainHead, HeadUnsuitable, head_behind
from defenses.nip.influence import LayerUnsuitable, check_layer, influence, log_odds_influence, neuron_outputs
from defenses.nip.inverse_perturbation import InversePerturbation, InversePerturbationConfig, Pool
from defenses.nip.neurons import Neurons, Template, build_template, count_remaining, index_similarity, select_neurons
from defenses.nip.oracle import OracleAnswers, oracle_answers
from defenses.nip.plan import NipPlan
from defenses.nip.pool import BuiltPool, PoolTooLarge, build_pool, check_size, choose_examples, inverse_perturbations
from defenses.nip.response import Pushing, ResponseConfig, ResponseJudge
from defenses.nip.response_defense import FittedResponse, fit_response_defense, response_layer, response_parts
from defenses.nip.response_fit import ResponseReport, fit_response
from defenses.nip.response_plan import ResponsePlan
from defenses.nip.substitute_training import SubstitutePlan
from defenses.nip.success import CleanSuccess, DefenseSuccess, Direction, SuccessRow

__all__ = [
    "AutogradHead",
    "BuiltPool",
    "ChainHead",
    "CleanSuccess",
    "CorrectionConfig",
    "DefenseSuccess",
    "Direction",
    "FittedGate",
    "FittedNip",
    "FittedResponse",
    "GateReport",
    "GatedPlan",
    "HeadUnsuitable",
    "InspectorMissing",
    "InverseCorrection",
    "InversePerturbation",
    "InversePerturbationConfig",
    "LayerUnsuitable",
    "Neurons",
    "NipPlan",
    "OracleAnswers",
    "Pool",
    "PoolTooLarge",
    "Pushing",
    "Replaced",
    "ResponseConfig",
    "ResponseJudge",
    "ResponsePlan",
    "ResponseReport",
    "Strength",
    "SubstitutePlan",
    "SuccessRow",
    "Template",
    "Tried",
    "build_pool",
    "build_template",
    "check_correction",
    "check_layer",
    "check_size",
    "choose_amplitude",
    "choose_examples",
    "count_remaining",
    "export_correction",
    "fit_gated",
    "fit_nip",
    "fit_response",
    "fit_response_defense",
    "gated_parts",
    "head_behind",
    "index_similarity",
    "influence",
    "inverse_perturbations",
    "log_odds_influence",
    "neuron_outputs",
    "oracle_answers",
    "response_layer",
    "response_parts",
    "select_neurons",
]
