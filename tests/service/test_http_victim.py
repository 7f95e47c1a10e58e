"""An attacker who is told a real gateway's answers and nothing else."""

import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from defenses.attacks import Attack, Facts, attack
from service.client import Client, GatewayRefused, GatewayUnreachable
from service.http_victim import (
    AnswerBeyondClasses,
    AttackSeesTooMuch,
    Facing,
    GradientWithheld,
    HttpVictim,
    attack_through,
)

SILENCE = 4
"""The column of no answer, behind those of four classes."""

REACHES = torch.linspace(0.02, 0.6, 12)
TRIES = 4


def blended(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the first misclassified blend of each image with coarse dark patterns, nearer ones first."""
    x_adv, active = x.clone(), torch.ones(len(x), dtype=torch.bool)
    for reach in REACHES.repeat_interleave(TRIES):
        pattern = 0.29 * torch.rand(len(x), 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        tried = torch.where(active.reshape(-1, 1, 1, 1), x + reach * (pattern - x), x_adv)
        fooled = active & (model(tried).argmax(1) != y)
        x_adv[fooled], active = tried[fooled], active & ~fooled
        if not active.any():
            break
    return x_adv


BLENDED = Attack("blended", {}, blended, Facts("none", "labels", len(REACHES) * TRIES, "a search by labels alone"))


@pytest.fixture
def client(server) -> Iterator[Client]:
    with closing(Client(server.url)) as opened:
        yield opened


def floats(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).float() / 255


def told(client: Client, model: str, images: np.ndarray) -> Tensor:
    return torch.from_numpy(client.classify(model, images).class_index)


def quietly(*_: object) -> None:
    pass


def test_the_logits_are_the_label_that_is_told_and_nothing_else(client, dark):
    victim, images = HttpVictim(client, "digits", 4, batch_size=3), dark(8)
    logits = victim(floats(images))
    assert logits.shape == (8, 5)
    assert logits.argmax(1).tolist() == told(client, "digits", images).tolist()
    assert len(set(logits.argmax(1).tolist())) > 1
    assert logits.sum(1).tolist() == logits.amax(1).tolist() == [1] * 8
    assert not logits.requires_grad
    assert victim.queries == 8


def test_images_are_sent_rounded_to_8_bits(client, dark):
    seen: list[np.ndarray] = []

    class Noting(Client):
        def classify(self, model, images, batch_size=32):
            seen.append(images)
            return super().classify(model, images, batch_size)

    images = dark(4)
    with closing(Noting(str(client._http.base_url))) as noting:
        HttpVictim(noting, "digits", 4)(floats(images) + 0.3 / 255)
        HttpVictim(noting, "digits", 4)(floats(images) - 2)
    assert seen[0].dtype == np.uint8
    assert np.array_equal(seen[0], images)
    assert not seen[1].any()


def test_an_alert_is_no_answer(client, dark, bright):
    images = np.concatenate([dark(3), bright(3)])
    labels = told(client, "digits", images).tolist()
    assert HttpVictim(client, "digits", 4)(floats(images)).argmax(1).tolist() == [*labels[:3], *[SILENCE] * 3]


def test_a_class_that_is_withheld_is_no_answer(serve, bright):
    with serve(models="digits", mode="enforce") as server, closing(Client(server.url)) as client:
        logits = HttpVictim(client, "digits", 4)(floats(bright(3)))
    assert logits.argmax(1).tolist() == [SILENCE] * 3


def test_who_gets_no_answer_has_fooled_nobody(client, dark, bright):
    images = np.concatenate([dark(3), bright(3)])
    labels = told(client, "digits", images)
    y = (labels + torch.tensor([0, 1, 0, 1, 1, 0])) % 4
    victim = HttpVictim(client, "digits", 4)
    logits = victim.facing(y)(floats(images))
    assert logits.shape == (6, 4)
    assert (logits.argmax(1) != y).tolist() == [False, True, False, False, False, False]
    assert logits.sum(1).tolist() == [1] * 6
    of_one = victim.facing(y[1:2])(floats(images))
    assert of_one.argmax(1).tolist() == [*labels[:3].tolist(), *[int(y[1])] * 3]
    with pytest.raises(ValueError, match="Expected 2 images, one of each true class in order, got 6"):
        Facing(victim, y[:2])(floats(images))


def test_a_gradient_is_refused_before_anything_is_sent(client, dark):
    victim = HttpVictim(client, "digits", 4)
    x = floats(dark(2)).requires_grad_()
    with pytest.raises(GradientWithheld, match="the gateway answers for digits with labels alone"):
        victim(x)
    with pytest.raises(GradientWithheld):
        attack("fgsm").run(victim, x.detach(), torch.tensor([0, 1]))
    assert victim.queries == 0
    with torch.no_grad():
        assert victim(x).shape == (2, 5)


def test_a_class_beyond_those_known_is_told_by_its_number(client, dark):
    images = dark(12)
    assert int(told(client, "digits", images).max()) > 0
    with pytest.raises(AnswerBeyondClasses, match=r"answer for digits with classes below 1, got [123]"):
        HttpVictim(client, "digits", 1)(floats(images))


def test_what_the_client_meets_is_passed_on(client, dark):
    with pytest.raises(GatewayRefused, match="404: No model letters"):
        HttpVictim(client, "letters", 4)(floats(dark(1)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        with (
            closing(Client(f"http://127.0.0.1:{probe.getsockname()[1]}")) as nowhere,
            pytest.raises(GatewayUnreachable),
        ):
            HttpVictim(nowhere, "digits", 4)(floats(dark(1)))


@pytest.mark.parametrize("sought", [BLENDED, attack("boundary:steps=20")])
def test_a_search_by_labels_fools_the_gateway_and_its_queries_are_counted(client, dark, sought):
    images = dark(8, seed=3)
    labels = told(client, "digits", images)
    targets = labels.clone()
    targets[1] = (labels[1] + 1) % 4  # already misclassified
    victim = HttpVictim(client, "digits", 4)
    done: list[tuple[str, int, int]] = []
    examples = attack_through(
        sought, victim, torch.from_numpy(images), targets, limit=4, seed=0, progress=lambda *step: done.append(step)
    )
    assert examples.rows.tolist() == [0, 2, 3, 4]
    assert torch.equal(examples.x, torch.from_numpy(images)[examples.rows])
    assert torch.equal(examples.y, targets[examples.rows])
    assert examples.x_adv.dtype == torch.uint8
    assert done == [(sought.name, count, 4) for count in (1, 2, 3, 4)]
    # Each of five images is sent once before, each of four once after.
    assert victim.queries == int(examples.queries.sum()) + 9
    assert (examples.queries > 0).all()
    assert examples.fooled.any()
    answers = client.classify("digits", examples.x_adv.numpy())
    fooled = (torch.from_numpy(answers.class_index) != examples.y) & ~torch.from_numpy(answers.alerted)
    assert torch.equal(fooled, examples.fooled)
    assert (examples.x_adv != examples.x).flatten(1).any(1)[fooled].all()


def test_each_image_is_attacked_by_itself_from_its_own_seed(client, dark):
    images = torch.from_numpy(dark(4, seed=3))
    targets, victim = told(client, "digits", images.numpy()), HttpVictim(client, "digits", 4)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    few, all_of_them, otherwise = (
        attack_through(BLENDED, victim, images, targets, limit=limit, seed=seed, progress=quietly)
        for limit, seed in ((2, 0), (4, 0), (4, 1))
    )
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(few.x_adv, all_of_them.x_adv[:2])
    assert few.queries.tolist() == all_of_them.queries.tolist()[:2]
    assert not torch.equal(all_of_them.x_adv, otherwise.x_adv)


@pytest.mark.parametrize(("name", "sees"), [("pgd", "gradients"), ("square", "scores")])
def test_an_attack_that_needs_more_than_labels_is_refused_before_anything_is_sent(client, dark, name, sees):
    victim = HttpVictim(client, "digits", 4)
    with pytest.raises(AttackSeesTooMuch, match=f"got {name}, which sees {sees}"):
        attack_through(attack(name), victim, torch.from_numpy(dark(2)), torch.tensor([0, 1]), limit=2, seed=0,
                       progress=quietly)  # fmt: skip
    assert victim.queries == 0


def test_where_every_image_is_misclassified_there_is_nothing_to_attack(client, dark):
    images = dark(3)
    wrong = (told(client, "digits", images) + 1) % 4
    with pytest.raises(ValueError, match="misclassifies all of the 3 images"):
        attack_through(BLENDED, HttpVictim(client, "digits", 4), torch.from_numpy(images), wrong, limit=3, seed=0,
                       progress=quietly)  # fmt: skip
