"""The studies of a published NIP defense: what they find, as JSON, as tables and as plots."""

from service.nip_studies.plots import check_folder, write_plots
from service.nip_studies.report import (
    StudyName,
    StudyPlan,
    StudyReport,
    StudyUnknown,
    StudyUnsuitable,
    check_suitable,
    known_studies,
    run_studies,
)
from service.nip_studies.tables import study_tables

__all__ = [
    "StudyName",
    "StudyPlan",
    "StudyReport",
    "StudyUnknown",
    "StudyUnsuitable",
    "check_folder",
    "check_suitable",
    "known_studies",
    "run_studies",
    "study_tables",
    "write_plots",
]
