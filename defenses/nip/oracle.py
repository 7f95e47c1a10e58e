"""The oracle of the authors' program: it knows the clean image. For evaluation only; nothing can serve it."""

from typing import NamedTuple

import torch
from torch import Tensor

from defenses.classifier import Classifier
from defenses.nip.head import Head
from defenses.nip.inverse_perturbation import moved
from defenses.nip.plan import Sign
from defenses.nip.pool import inverse_perturbations
from defenses.pixels import to_float


class OracleAnswers(NamedTuple):
    """What the oracle makes of N adversarial examples.

    ``x_moved`` (N, C, H, W) in [0, 1] are the moved examples that it keeps and ``logits`` (N, K) what the classifier
    says of them; ``answered`` bool (N,) says whether either sign gave the prediction of the clean image. On the CPU.
    """

    logits: Tensor
    x_moved: Tensor
    answered: Tensor


def oracle_answers(
    classifier: Classifier,
    head: Head,
    layer: str,
    x: Tensor,
    x_adv: Tensor,
    *,
    k1: int,
    k2: int,
    amplitude: float,
    batch_size: int,
    device: torch.device,
) -> OracleAnswers:
    """Move adversarial examples by the inverse perturbation of their own clean counterparts, with the better sign.

    ``x`` uint8 or float in [0, 1] (N, C, H, W) are the clean images, ``x_adv`` what an attack made of them. Of the two
    signs of the gradient the one is kept whose answer is the prediction of the clean image; where both or neither are,
    it is the printed one. No server has the clean image, nor its prediction: the rate that comes of this is an upper
    end, not a defense's. Classifier and head are in evaluation mode on ``device``.
    """
    batches = zip(x.split(batch_size), x_adv.split(batch_size), strict=True)
    parts = [
        _batch(classifier, head, layer, to_float(clean.to(device)), to_float(adversarial.to(device)), k1, k2, amplitude)
        for clean, adversarial in batches
    ]
    return OracleAnswers(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _batch(
    classifier: Classifier, head: Head, layer: str, clean: Tensor, x_adv: Tensor, k1: int, k2: int, amplitude: float
) -> OracleAnswers:
    printed: Sign = "tail-front"
    made = inverse_perturbations(classifier, layer, head, clean, k1=k1, k2=k2, sign=printed)
    known = made.logits.argmax(1)
    with torch.no_grad():
        ahead, back = (moved(x_adv, made.rho, sign * amplitude) for sign in (1, -1))
        logits_ahead, logits_back = classifier(ahead), classifier(back)
    right_ahead, right_back = (logits.argmax(1) == known for logits in (logits_ahead, logits_back))
    turned = right_back & ~right_ahead
    logits = torch.where(turned.unsqueeze(1), logits_back, logits_ahead)
    x_moved = torch.where(turned.reshape(-1, 1, 1, 1), back, ahead)
    return OracleAnswers(logits, x_moved, right_ahead | right_back)
