"""Evaluating published defenses from the store: what `portcullis evaluate` does without a gateway."""

from service.evaluation.document import EvaluationReport
from service.evaluation.run import Evaluated, evaluate_defenses
from service.evaluation.subjects import SubjectsUnlike, load_subjects

__all__ = ["Evaluated", "EvaluationReport", "SubjectsUnlike", "evaluate_defenses", "load_subjects"]
