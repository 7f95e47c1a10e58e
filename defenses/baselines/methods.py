"""The baselines by name: what each may be told, and the purifier and detector that come of it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Self, cast

from defenses.baselines.additive_noise import AdditiveNoise
from defenses.baselines.bit_depth import BitDepthReduction
from defenses.baselines.feature_squeezing import FeatureSqueezing
from defenses.baselines.identity import Identity
from defenses.baselines.jpeg import SUBSAMPLINGS, JpegCompression, Subsampling
from defenses.baselines.lid import LidDetector, Watch
from defenses.baselines.magnet import MagNetDetector, Reformer
from defenses.baselines.options import Choice, Option, Share, Whole, completed
from defenses.baselines.smoothing import MedianSmoothing
from defenses.baselines.total_variation import TotalVariationMinimisation
from defenses.detector import Detector, NoDetector
from defenses.purifier import Purifier

Value = int | float | str


class MethodUnknown(ValueError):
    """No baseline has this name."""

    def __init__(self, method: str) -> None:
        self.method = method
        super().__init__(f"Expected a method among {', '.join(METHODS)}, got {method!r}.")


@dataclass(frozen=True)
class BaselineConfig:
    """Say what a baseline is: its ``method``, the ``options`` of its parts by name, and the images that it is for.

    ``image_shape`` is (C, H, W); ``watched`` are the layers that a detector looks at, where its method names any.
    """

    method: str
    options: Mapping[str, Value]
    image_shape: tuple[int, int, int]
    watched: tuple[Watch, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values."""
        return {**asdict(self), "options": dict(self.options)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Return the configuration that ``as_json`` described.

        Raises ``KeyError``, ``TypeError`` and ``ValueError`` for what is none.
        """
        method, options = values["method"], values["options"]
        channels, height, width = values["image_shape"]
        watched = tuple(Watch(each["name"], tuple(each["shape"])) for each in values["watched"])
        return cls(method, completed(method, known(method).options, options), (channels, height, width), watched)

    def parts(self) -> tuple[Purifier, Detector]:
        """Return the purifier and the detector in evaluation mode, before anything is fitted."""
        purifier, detector = known(self.method).build(self)
        return purifier.eval(), detector.eval()

    def whole(self, name: str) -> int:
        """Return an option that is a whole number."""
        return cast(int, self.options[name])

    def share(self, name: str) -> float:
        """Return an option that is a real number."""
        return float(self.options[name])

    def choice(self, name: str) -> str:
        """Return an option that is a word."""
        return cast(str, self.options[name])


@dataclass(frozen=True)
class Method:
    """Hold a baseline: the options of its parts, what builds these, and how they are fitted.

    ``training`` are the options that say how long and with what it is trained. ``detects`` says whether it alerts, and
    ``learns_attacks`` whether it is fitted to attacks.
    """

    options: Mapping[str, Option]
    build: Callable[[BaselineConfig], tuple[Purifier, Detector]]
    training: Mapping[str, Option] = field(default_factory=dict)
    detects: bool = False
    learns_attacks: bool = False


def known(method: str) -> Method:
    """Return the baseline of that name; raises ``MethodUnknown``."""
    if method not in METHODS:
        raise MethodUnknown(method)
    return METHODS[method]


def config_of(purifier: Purifier, detector: Detector, image_shape: tuple[int, int, int]) -> BaselineConfig | None:
    """Return what a purifier and a detector are configured as, None where they are no baseline's."""
    method: str
    options: dict[str, Value] = {}
    watched: tuple[Watch, ...] = ()
    match purifier, detector:
        case Identity(), NoDetector():
            method = "none"
        case MedianSmoothing(kernel=kernel), NoDetector():
            method, options = "smoothing", {"kernel": kernel}
        case BitDepthReduction(bits=bits), NoDetector():
            method, options = "bit-depth", {"bits": bits}
        case JpegCompression(quality=quality, subsampling=subsampling), NoDetector():
            method, options = "jpeg", {"quality": quality, "subsampling": subsampling}
        case TotalVariationMinimisation(weight=weight, steps=steps), NoDetector():
            method, options = "total-variation", {"weight": weight, "steps": steps}
        case AdditiveNoise(sigma=sigma), NoDetector():
            method, options = "noise", {"sigma": sigma}
        case Identity(), FeatureSqueezing(bits=bits, kernel=kernel, search=search, strength=strength):
            method = "feature-squeezing"
            options = {"bits": bits, "kernel": kernel, "search": search, "strength": strength}
        case Reformer(), MagNetDetector():
            method = "magnet"
        case Identity(), LidDetector(watched=watched, neighbors=neighbors, references=references):
            method, options = "lid", {"neighbors": neighbors, "references": len(references[0])}
        case _:
            return None
    return BaselineConfig(method, options, image_shape, watched)


def _identity(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return Identity(), NoDetector()


def _smoothing(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return MedianSmoothing(config.whole("kernel")), NoDetector()


def _bit_depth(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return BitDepthReduction(config.whole("bits")), NoDetector()


def _jpeg(config: BaselineConfig) -> tuple[Purifier, Detector]:
    subsampling = cast(Subsampling, config.choice("subsampling"))
    return JpegCompression(config.whole("quality"), subsampling), NoDetector()


def _total_variation(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return TotalVariationMinimisation(config.share("weight"), config.whole("steps")), NoDetector()


def _noise(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return AdditiveNoise(config.share("sigma")), NoDetector()


def _feature_squeezing(config: BaselineConfig) -> tuple[Purifier, Detector]:
    detector = FeatureSqueezing(
        config.whole("bits"), config.whole("kernel"), config.whole("search"), config.share("strength")
    )
    return Identity(), detector


def _magnet(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return Reformer(config.image_shape[0]), MagNetDetector()


def _lid(config: BaselineConfig) -> tuple[Purifier, Detector]:
    return Identity(), LidDetector(config.watched, config.whole("references"), config.whole("neighbors"))


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "none": Method({}, _identity),
        "smoothing": Method({"kernel": Whole(3, 2, 15)}, _smoothing),
        "bit-depth": Method({"bits": Whole(4, 1, 7)}, _bit_depth),
        "jpeg": Method({"quality": Whole(75, 1, 100), "subsampling": Choice(SUBSAMPLINGS)}, _jpeg),
        "total-variation": Method({"weight": Share(0.03, 0, 10), "steps": Whole(20, 1, 200)}, _total_variation),
        "noise": Method({"sigma": Share(0.03, 0, 1)}, _noise),
        "feature-squeezing": Method(
            {
                "bits": Whole(5, 1, 7),
                "kernel": Whole(2, 2, 15),
                "search": Whole(11, 3, 21, odd=True),
                "strength": Share(4 / 255, 0, 1),
            },
            _feature_squeezing,
            detects=True,
        ),
        "magnet": Method({}, _magnet, {"epochs": Whole(5, 1, 10_000), "sigma": Share(0.025, 0, 1)}, detects=True),
        "lid": Method(
            {"neighbors": Whole(20, 2, 1000), "references": Whole(100, 2, 10_000)},
            _lid,
            detects=True,
            learns_attacks=True,
        ),
    }
)
"""Every baseline by name; the options in the units of an image in [0, 1]."""
