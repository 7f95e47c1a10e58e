"""Score fusion: what the Regulator's work betrays, weighed together with what the Inspector sees."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from defenses.detector import Evidence

CLUES = (
    "decision",
    "margin",
    "log_margin",
    "purified_margin",
    "log_purified_margin",
    "surprise",
    "log_divergence",
    "log_reverse_divergence",
    "energy",
    "purified_energy",
    "disagreement",
    "log_distance",
    "log_logit_distance",
)
"""The names of a fusion's inputs, in their order."""

FLOOR = 1e-2
"""What is added before a logarithm, so that the last bits of a small margin do not matter."""

LIMIT = 6.0
"""How many standard deviations from the benign mean a clue counts at most."""


CORRECTED = 0.1
"""What an attack that the Regulator undoes counts in the fit, beside one that it leaves."""

INVERSE_PENALTY = 0.1
"""The C of the fusion's regression."""


class Fusion(nn.Module):
    """Turn the Inspector's decisions (N,) and the evidence into log odds (N,) of an attack, by a quadratic form.

    The clues are standardised by what benign images show, and clipped; the log odds are linear in them and in their
    products. Everything is smooth almost everywhere, so that an attacker who knows the defense has gradients to follow,
    and so has who measures it.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(CLUES)))
        self.register_buffer("scale", torch.ones(len(CLUES)))
        self.linear = nn.Parameter(torch.zeros(len(CLUES)))
        self.quadratic = nn.Parameter(torch.zeros(len(CLUES), len(CLUES)))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, decisions: Tensor, evidence: Evidence) -> Tensor:
        seen = self.standardised(torch.cat([decisions[:, None], clues(evidence)], 1))
        return seen @ self.linear + ((seen @ self.quadratic) * seen).sum(1) + self.bias

    def standardised(self, seen: Tensor) -> Tensor:
        """Return the clues (N, 13) in benign standard deviations from the benign mean, clipped."""
        return ((seen - self.mean) / self.scale).clamp(-LIMIT, LIMIT)


def clues(evidence: Evidence) -> Tensor:
    """Return all clues but the decision, in the order of ``CLUES``, (N, 12)."""
    raw, purified = evidence.undefended_logits, evidence.logits
    raw_log, purified_log = raw.log_softmax(1), purified.log_softmax(1)
    divergence = (raw_log.exp() * (raw_log - purified_log)).sum(1).clamp_min(0)
    reverse = (purified_log.exp() * (purified_log - raw_log)).sum(1).clamp_min(0)
    answer = purified.argmax(1, keepdim=True)
    margin, purified_margin = _margin(raw), _margin(purified)
    return torch.stack(
        [
            margin,
            (margin + FLOOR).log(),
            purified_margin,
            (purified_margin + FLOOR).log(),
            -raw_log.gather(1, answer).squeeze(1),
            (divergence + FLOOR).log(),
            (reverse + FLOOR).log(),
            raw.logsumexp(1),
            purified.logsumexp(1),
            (raw.argmax(1) != answer.squeeze(1)).float(),
            (evidence.distance + FLOOR).log(),
            ((raw - purified).norm(dim=1) + FLOOR).log(),
        ],
        1,
    )


def fit_fusion(fusion: Fusion, clean: Tensor, attacks: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fit a fusion to the clues (N, 13) of clean images, and for each attack to (clues, which are corrected).

    Clean and attacked images count the same together, and so does each attack; within an attack one that the Regulator
    undid counts a tenth of one that it left, since it is resisted already. The regression is L2-penalised on
    standardised terms.
    """
    from sklearn.linear_model import LogisticRegression

    fusion.mean.copy_(clean.mean(0))
    fusion.scale.copy_(clean.std(0).clamp_min(1e-6))
    seen = fusion.standardised(torch.cat([clean, *(each for each, _ in attacks)]).to(fusion.mean.device)).cpu()
    adversarial = torch.cat([torch.zeros(len(clean)), torch.ones(len(seen) - len(clean))])
    shares = [torch.where(corrected, CORRECTED, 1.0) for _, corrected in attacks]
    weights = torch.cat(
        [torch.full((len(clean),), 1 / len(clean)), *(share / share.sum() / len(shares) for share in shares)]
    )
    rows, columns = torch.triu_indices(len(CLUES), len(CLUES))
    terms = torch.cat([seen, seen[:, rows] * seen[:, columns]], 1)
    mean, scale = terms.mean(0), terms.std(0).clamp_min(1e-6)
    regression = LogisticRegression(C=INVERSE_PENALTY, max_iter=2000)
    regression.fit(((terms - mean) / scale).numpy(), adversarial.numpy(), (weights / weights.mean()).numpy())
    coefficients = torch.from_numpy(regression.coef_[0]).float() / scale
    fusion.linear.data.copy_(coefficients[: len(CLUES)])
    quadratic = torch.zeros(len(CLUES), len(CLUES))
    quadratic[rows, columns] = coefficients[len(CLUES) :]
    fusion.quadratic.data.copy_(quadratic)
    fusion.bias.data.fill_(float(regression.intercept_[0]) - float(coefficients @ mean))


def _margin(logits: Tensor) -> Tensor:
    highest = logits.topk(2, dim=1).values
    return highest[:, 0] - highest[:, 1]
