"""NIP: reclassification after an inverse perturbation (Chen et al., Fight Perturbations with Perturbations)."""

from defenses.nip.amplitude import Strength, Tried, choose_amplitude
from defenses.nip.fit import FittedNip, fit_nip
from defenses.nip.head import AutogradHead, ChainHead, HeadUnsuitable, head_behind
from defenses.nip.influence import LayerUnsuitable, check_layer, influence, log_odds_influence, neuron_outputs
from defenses.nip.inverse_perturbation import InversePerturbation, InversePerturbationConfig, Pool
from defenses.nip.neurons import Neurons, Template, build_template, count_remaining, index_similarity, select_neurons
from defenses.nip.oracle import OracleAnswers, oracle_answers
from defenses.nip.plan import NipPlan
from defenses.nip.pool import BuiltPool, PoolTooLarge, build_pool, check_size, choose_examples, inverse_perturbations
from defenses.nip.success import CleanSuccess, DefenseSuccess, Direction, SuccessRow

__all__ = [
    "AutogradHead",
    "BuiltPool",
    "ChainHead",
    "CleanSuccess",
    "DefenseSuccess",
    "Direction",
    "FittedNip",
    "HeadUnsuitable",
    "InversePerturbation",
    "InversePerturbationConfig",
    "LayerUnsuitable",
    "Neurons",
    "NipPlan",
    "OracleAnswers",
    "Pool",
    "PoolTooLarge",
    "Strength",
    "SuccessRow",
    "Template",
    "Tried",
    "build_pool",
    "build_template",
    "check_layer",
    "check_size",
    "choose_amplitude",
    "choose_examples",
    "count_remaining",
    "fit_nip",
    "head_behind",
    "index_similarity",
    "influence",
    "inverse_perturbations",
    "log_odds_influence",
    "neuron_outputs",
    "oracle_answers",
    "select_neurons",
]
