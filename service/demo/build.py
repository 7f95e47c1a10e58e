"""Building the demonstration's model: a small classifier of digits, and CoopHANCE around it."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from defenses.coophance import FitPlan, InspectorPlan, RegulatorPlan
from defenses.evaluation import Progress
from model_store import SERVING, InputSpec, Store
from service.datasets import Split, load_dataset
from service.fit_coophance import publish_coophance
from service.register import Declaration, register
from service.repository import MODELS

NAME = "digits"
SEED = 0
SHAPE = (1, 32, 32)
EPOCHS = 8
ATTACKS = ("fgsm:epsilon=48/255", "pgd-stop:step_size=2/255,steps=100")

PLAN = FitPlan(
    attacks=ATTACKS,
    examples=600,
    test_examples=120,
    regulator=RegulatorPlan(epochs=8, batch_size=64, flip=False),
    inspector=InspectorPlan(inverse_penalty=1e-3),
    seed=SEED,
)


def is_built(store: Path) -> bool:
    """Say whether the store serves the demonstration's protected model."""
    models = Store.open(store / MODELS)
    serving = models.aliases(NAME).get(SERVING) if NAME in models.models() else None
    return serving is not None and models.manifest(NAME, serving).kind == "coophance"


def build_demo(store: Path, progress: Progress) -> None:
    """Train the classifier, register it, fit CoopHANCE for it and promote it."""
    models = Store.open(store / MODELS)
    spec = InputSpec(shape=SHAPE, mode="L", resize="bilinear")
    dataset = load_dataset(["digits"], spec, labels=None, split_seed=SEED)
    classifier = train(dataset.fit, progress)
    declared = Declaration(shape=SHAPE, resize="bilinear", labels=dataset.labels)
    registered = register(models, NAME, classifier, declared, command="portcullis demo")
    fetched = models.fetch(NAME, registered.version)
    fitted = publish_coophance(store, fetched, dataset, PLAN, progress=progress, command="portcullis demo")
    models.set_alias(NAME, SERVING, fitted.version)


def train(split: Split, progress: Progress) -> nn.Module:
    """Train a small convolutional network on grey 32x32 images; returns it in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
        images, targets = torch.from_numpy(split.images), torch.from_numpy(split.targets)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for epoch in range(EPOCHS):
            for rows in torch.randperm(len(images)).split(64):
                loss = F.cross_entropy(network(images[rows].float() / 255), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            progress("classifier", epoch + 1, EPOCHS)
    return network.eval()
