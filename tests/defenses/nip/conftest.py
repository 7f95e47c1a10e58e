"""What the tests of NIP share: handwritten digits, and small classifiers of them with heads of every form."""

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from defenses.classifier import Classifier
from defenses.coophance import Inspector, InspectorConfig
from defenses.nip import InversePerturbation, NipPlan, build_pool, head_behind
from defenses.onnx_import import canonicalise
from defenses.onnx_trace import export_classifier
from defenses.splits import LabelledImages, Splits

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


class Averaged(nn.Module):
    """Average maps (N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Product(nn.Module):
    """A dense layer written as a product and a sum."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(before, after) / before**0.5)
        self.bias = nn.Parameter(torch.randn(after))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + x @ self.weight


def trunk(width: int) -> list[nn.Module]:
    return [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, width, 3, padding=1), nn.ReLU()]


HEADS: dict[str, Callable[[], tuple[nn.Sequential, nn.Sequential]]] = {
    "linear": lambda: (
        nn.Sequential(*trunk(32), Averaged()),
        nn.Sequential(nn.Linear(32, 10)),
    ),
    "dropout": lambda: (
        nn.Sequential(*trunk(32), Averaged()),
        nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Linear(32, 10)),
    ),
    "product": lambda: (
        nn.Sequential(*trunk(4), nn.Flatten()),
        nn.Sequential(Product(64, 10)),
    ),
    "deep": lambda: (
        nn.Sequential(*trunk(4), nn.Flatten()),
        nn.Sequential(nn.Linear(64, 24), nn.ReLU(), Product(24, 16), nn.ReLU(), nn.Linear(16, 10)),
    ),
    "maps": lambda: (
        nn.Sequential(*trunk(12)),
        nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 10)),
    ),
    "smooth": lambda: (
        nn.Sequential(*trunk(4), nn.Flatten()),
        nn.Sequential(nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, 10)),
    ),
}
"""What comes before the layer that NIP looks at, and what comes behind it."""


@pytest.fixture(scope="session")
def digits() -> LabelledImages:
    """1,500 handwritten digits, uint8 (1500, 1, 8, 8), and their classes."""
    data = load_digits()
    images = torch.from_numpy(data.images * 255 / 16).round().to(torch.uint8)[:1500].unsqueeze(1)
    return LabelledImages(images, torch.from_numpy(data.target)[:1500].long())


@pytest.fixture(scope="session")
def splits(digits) -> Splits:
    """The digits in parts of 800, 300, 100 and 300."""
    parts = [LabelledImages(*part) for part in zip(*(each.split([800, 300, 100, 300]) for each in digits), strict=True)]
    return Splits(*parts)


@pytest.fixture(scope="session")
def network(splits) -> Callable[[str], tuple[nn.Sequential, nn.Sequential]]:
    """Train a small classifier on the digits to fit: ``network("linear")`` are its two parts."""
    trained: dict[str, tuple[nn.Sequential, nn.Sequential]] = {}

    def build(form: str) -> tuple[nn.Sequential, nn.Sequential]:
        if form not in trained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                before, behind = HEADS[form]()
                whole = nn.Sequential(before, behind)
                images, targets = splits.fit.images.float() / 255, splits.fit.targets
                optimizer = torch.optim.Adam(whole.parameters(), lr=0.01)
                for _ in range(60):
                    loss = nn.functional.cross_entropy(whole(images), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
            trained[form] = (before.eval(), behind.eval())
        return trained[form]

    return build


@pytest.fixture(scope="session")
def classifier(network) -> Callable[[str], Classifier]:
    """The same as a registered classifier: ``classifier("linear")``."""
    built: dict[str, Classifier] = {}

    def build(form: str) -> Classifier:
        if form not in built:
            graph = export_classifier(nn.Sequential(*network(form)), SHAPE)
            built[form] = Classifier(canonicalise(graph)).eval()
        return built[form]

    return build


@pytest.fixture(scope="session")
def layer_of(classifier) -> Callable[[str], str]:
    """The name of the layer between the two parts of a network."""

    def name(form: str) -> str:
        return classifier(form).resolve_layer("0").name

    return name


@pytest.fixture(scope="session")
def purifier(classifier, layer_of, splits) -> Callable[..., InversePerturbation]:
    """An inverse perturbation of a plan for a network: ``purifier("linear", k1=3)``, by the printed method else."""

    def build(form: str = "linear", **choices: object) -> InversePerturbation:
        plan = NipPlan(**{"candidates": 60, "precision": "float32", **choices})
        subject = classifier(form)
        layer = subject.resolve_layer(layer_of(form))
        built = build_pool(subject, layer, *splits.fit, plan, device=CPU, progress=lambda stage, done, total: None)
        made = InversePerturbation(built.config, head_behind(subject, layer))
        made.set_pool(built.pool)
        return made.eval()

    return build


@pytest.fixture(scope="session")
def inspector() -> Callable[..., Inspector]:
    """An Inspector with weights drawn at random: ``inspector(classifier, "purified", fusion=True)``."""

    def build(subject: Classifier, inspects: str = "raw", *, fusion: bool = False) -> Inspector:
        tap = subject.tap
        made = Inspector(InspectorConfig(tap.name, tap.shape, 10, inspects, fusion=fusion))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.init.normal_(made.weight, std=0.05)
            if made.fusion is not None:
                nn.init.normal_(made.fusion.linear)
        return made.eval()

    return build
