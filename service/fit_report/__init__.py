"""The report of a fit, for people (HTML) and for programs (JSON), to be published with what was fitted."""

import json
from pathlib import Path

import torch

from defenses.coophance import Fitted
from model_store import Draft
from service.fit_report.document import DraftIncomplete, checked_seed, describe
from service.fit_report.page import render
from service.fit_report.samples import look_at

__all__ = ["JSON_FILE", "PAGE_FILE", "DraftIncomplete", "write_report"]

JSON_FILE = "report.json"
PAGE_FILE = "report.html"


def write_report(fitted: Fitted, folder: Path, *, name: str, draft: Draft, device: torch.device) -> None:
    """Write ``report.json`` and ``report.html`` of a fit into a folder, which is made if it is not there.

    ``name`` is what the defense is published under, ``draft`` what is recorded about it and ``device`` where it was
    fitted. The examples that were measured are answered there once more, with the noise of the measurement; ``fitted``
    is on the CPU afterwards, and the global random state as it was. The page needs no other file and no network.
    Raises ``DraftIncomplete``, and ``OSError`` where the folder cannot be written.
    """
    seed = checked_seed(draft)
    protected = fitted.protected.to(device)
    try:
        looks = [
            look_at(protected, each, draft.labels, fitted.calibration_scores, device=device, seed=seed)
            for each in fitted.test_examples
        ]
    finally:
        fitted.protected.cpu()
    report = describe(fitted, looks, name=name, draft=draft, device=device)
    page = render(report, [look.strips for look in looks])
    document = json.dumps(report, ensure_ascii=False, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_FILE).write_text(f"{document}\n", encoding="utf-8")
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
