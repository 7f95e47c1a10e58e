"""How long each stage of a fit took."""

from dataclasses import dataclass

from defenses.coophance import Fitted
from defenses.coophance.training import HANDOVER


@dataclass(frozen=True)
class StageTime:
    """A stage, what it took in seconds, and where they are known the images it dealt with, and those per second."""

    stage: str
    seconds: float
    images: int | None
    images_per_second: float | None


def stage_times(fitted: Fitted) -> list[StageTime]:
    """Return the stages in the order of the fit; the parts of a training and the classes of an Inspector as one."""
    taken: dict[str, float] = {}
    for name, seconds in fitted.seconds.items():
        stage = name if "examples" in name else name.partition(",")[0]
        taken[stage] = taken.get(stage, 0.0) + seconds
    images = _images(fitted)
    return [
        StageTime(stage, seconds, counted, counted / seconds if counted and seconds > 0 else None)
        for stage, seconds in taken.items()
        for counted in [images.get(stage)]
    ]


def _images(fitted: Fitted) -> dict[str, int]:
    images = {f"fit examples, {each.attack.name}": len(each.y) for each in fitted.examples}
    images |= {f"test examples, {each.attack.name}": len(each.y) for each in fitted.test_examples}
    if plan := fitted.training:
        handover = max(1, round(HANDOVER * plan.steps))
        last = (plan.steps - handover) * plan.batch_size
        images |= {"handover": handover * plan.batch_size, "sample model": last, "regulator": last}
    return images
