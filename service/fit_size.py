"""How large a fit is, method by method."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.resources import Part

FEWER_EXAMPLES = "fewer --examples take less"
FEWER_MEASURED = "fewer --test-examples take less"
SMALLER_BATCH = "a smaller --batch-size takes less"
SMALLER = "fewer --candidates, a smaller --eta or --precision float16 take less"

PEAK = 2
"""The peak of a training step over what its forward pass keeps, gradients and workspace included."""

POOL_PEAK = 9
"""The most memory that a pool takes, over its own bytes: measured where it becomes a graph, of 120 and of 230 MiB."""


@dataclass(frozen=True)
class CoophanceSize:
    """Say how large a fit of CoopHANCE is.

    ``image_shape`` is (C, H, W); ``fit``, ``validation`` and ``test`` count images. ``attacks``,
    ``examples``, ``validation_examples``, ``test_examples``, ``negatives`` and ``batch_size`` are the plan's, and
    ``features`` is how many features the Inspector's regressions have. In bytes: what a pass over one image keeps for
    the backward pass, in the Regulator (0 where it is not trained) and in the classifier
    (``defenses.footprint.saved_bytes``), and the weights of all three.
    """

    image_shape: tuple[int, int, int]
    fit: int
    validation: int
    test: int
    classes: int
    attacks: int
    examples: int
    validation_examples: int
    test_examples: int
    negatives: int
    batch_size: int
    features: int
    regulator_pass: int
    classifier_pass: int
    regulator_weights: int
    classifier_weights: int
    inspector_weights: int

    @property
    def fitted_on(self) -> int:
        """How many adversarial examples there are to fit on and to choose by, of all attacks."""
        each = min(self.examples, self.fit) + min(self.validation_examples, self.validation)
        return self.attacks * each

    @property
    def crafted(self) -> Part:
        """The examples of every attack: x as uint8, x_adv as float32, and 18 bytes of row, class and success."""
        count = self.fitted_on + self.attacks * min(self.test_examples, self.test)
        return Part("the adversarial examples", count * (5 * math.prod(self.image_shape) + 18), FEWER_EXAMPLES)

    @property
    def gathered(self) -> Part:
        """One attack's examples once more, while its batches are put together."""
        count = min(self.examples, self.fit)
        return Part("the adversarial examples", count * (5 * math.prod(self.image_shape) + 18), FEWER_EXAMPLES)

    @property
    def activations(self) -> Part:
        """What an Inspector is fitted on: the examples once more, and the features of one class.

        The features are float32, twice: gathered, and as the solver holds them. The class has all of its negatives and,
        of the adversarial examples, twice an equal share.
        """
        attacked = self.attacks * min(self.examples, self.fit)
        rows = min(self.negatives, self.fit) + min(attacked, math.ceil(2 * attacked / self.classes))
        size = 4 * self.fitted_on * math.prod(self.image_shape) + 2 * 4 * rows * self.features
        return Part("what the Inspector is fitted on", size, "fewer --examples, or another --layer, take less")

    @property
    def training(self) -> Part:
        """A training batch in the Regulator, and 16 times its weights.

        They are its gradients, Adam's two moments, the running average, and the points to stop at.
        """
        batch = min(self.batch_size, self.fit) * self.regulator_pass
        return Part("a training batch", PEAK * batch + 16 * self.regulator_weights, SMALLER_BATCH)

    @property
    def attack(self) -> Part:
        """A batch under attack in the classifier."""
        batch = min(self.batch_size, self.fit) * self.classifier_pass
        return Part("a batch under attack", PEAK * batch + self.classifier_weights, SMALLER_BATCH)

    @property
    def kept_examples(self) -> Part:
        """What is kept of the examples, all but x: every attack's, and one's again in the pieces that it is made of."""
        count = self.fitted_on + self.attacks * min(self.test_examples, self.test) + min(self.examples, self.fit)
        return Part("the adversarial examples", count * (4 * math.prod(self.image_shape) + 18), FEWER_EXAMPLES)

    @property
    def kept_weights(self) -> Part:
        """What is kept of the training: seven states of four times the weights, and each class's regressions."""
        return Part("the stages of the training", 28 * self.regulator_weights + 3 * self.inspector_weights, "make room")

    @property
    def exported(self) -> Part:
        """The graph and the checkpoint as they are written and again as they are published, and the Regulator's."""
        once = self.classifier_weights + 2 * (self.regulator_weights + self.inspector_weights)
        return Part("the protected classifier", 2 * (once + self.regulator_weights), "make room")

    @property
    def held(self) -> Sequence[Part]:
        """Every attack's examples."""
        return [self.crafted]

    @property
    def turns(self) -> Sequence[Part]:
        """Gathering an attack's examples, and fitting the Inspector."""
        return [self.gathered, self.activations]

    @property
    def batches(self) -> Sequence[Part]:
        """A training batch, and a batch under attack."""
        return [self.training, self.attack]

    @property
    def stored(self) -> Sequence[Part]:
        """The kept examples, the kept weights, and what is exported."""
        return [self.kept_examples, self.kept_weights, self.exported]


@dataclass(frozen=True)
class NipSize:
    """Say how large a fit of NIP is.

    ``image_shape`` is (C, H, W); ``test`` counts images. ``attacks``, ``test_examples`` and ``batch_size`` are the
    plan's, ``candidates`` is how many there will be. In bytes: the pool, what a pass over one image keeps for the
    backward pass in the classifier (``defenses.footprint.saved_bytes``), and its weights.
    """

    image_shape: tuple[int, int, int]
    test: int
    attacks: int
    test_examples: int
    batch_size: int
    candidates: int
    pool: int
    classifier_pass: int
    classifier_weights: int

    @property
    def crafted(self) -> Part:
        """The examples of every attack: x as uint8, x_adv as float32, and 18 bytes of row, class and success."""
        size = self._examples * (5 * math.prod(self.image_shape) + 18)
        return Part("the adversarial examples", size, FEWER_MEASURED)

    @property
    def graph(self) -> Part:
        """The pool while it becomes a part of the graph."""
        return Part("the graph that holds the pool", (POOL_PEAK - 1) * self.pool + 4 * self.classifier_weights, SMALLER)

    @property
    def nearest(self) -> Part:
        """A batch's distances to every candidate, float32 and thrice, and the pool beside the classifier."""
        size = self.pool + 12 * self.batch_size * self.candidates + self.classifier_weights
        return Part("the search for the nearest candidates", size, SMALLER)

    @property
    def attack(self) -> Part:
        """A batch under attack in the classifier, or a batch whose gradients become candidates."""
        batch = self.batch_size * self.classifier_pass
        return Part("a batch under attack", PEAK * batch + self.classifier_weights, SMALLER_BATCH)

    @property
    def held(self) -> Sequence[Part]:
        """The pool, and every attack's examples."""
        return [Part("the pool", self.pool, SMALLER), self.crafted]

    @property
    def turns(self) -> Sequence[Part]:
        """The pool's way into the graph."""
        return [self.graph]

    @property
    def batches(self) -> Sequence[Part]:
        """A batch under attack, and one whose nearest candidates are looked for."""
        return [self.attack, self.nearest]

    @property
    def stored(self) -> Sequence[Part]:
        """The stages of pool and examples, and graph and checkpoint as they are written and as they are published."""
        examples = self._examples * (4 * math.prod(self.image_shape) + 18)
        return [
            Part("the adversarial examples", examples, FEWER_MEASURED),
            Part("the pool, kept and published", 5 * self.pool + 2 * self.classifier_weights, SMALLER),
        ]

    @property
    def _examples(self) -> int:
        return self.attacks * min(self.test_examples, self.test)


@dataclass(frozen=True)
class MeasuredSize:
    """Say how large a fit is that trains nothing: its adversarial examples, and a batch under attack.

    ``examples`` counts those of all attacks, ``image_shape`` is (C, H, W). In bytes: what a pass over one image keeps
    for the backward pass in the classifier (``defenses.footprint.saved_bytes``), and the weights of all that is
    exported.
    """

    image_shape: tuple[int, int, int]
    examples: int
    batch_size: int
    classifier_pass: int
    weights: int

    @property
    def held(self) -> Sequence[Part]:
        """The examples: x as uint8, x_adv as float32, and 18 bytes of row, class and success."""
        size = self.examples * (5 * math.prod(self.image_shape) + 18)
        return [Part("the adversarial examples", size, FEWER_MEASURED)]

    @property
    def turns(self) -> Sequence[Part]:
        """The weights on their way into the graphs."""
        return [Part("the graphs", 4 * self.weights, "make room")]

    @property
    def batches(self) -> Sequence[Part]:
        """A batch under attack."""
        batch = self.batch_size * self.classifier_pass
        return [Part("a batch under attack", PEAK * batch + self.weights, SMALLER_BATCH)]

    @property
    def stored(self) -> Sequence[Part]:
        """The stages of the examples, and graphs and checkpoint as they are written and as they are published."""
        size = self.examples * (4 * math.prod(self.image_shape) + 18)
        return [
            Part("the adversarial examples", size, FEWER_MEASURED),
            Part("the protected classifier", 4 * self.weights, "make room"),
        ]
