"""What attacks on a label and a detector's score at once share: the images that got furthest so far."""

import torch
from torch import Tensor

from defenses.attacks.victim import Seen


class Furthest:
    """Keep for each image the form in which it got furthest.

    That is the one which is misclassified and not alerted under the most noises; of those alike in this, misclassified
    under the most; of those alike in this too, of the highest ``gain``. Until anything is offered it is x (N, C, H, W).
    """

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.detach().clone()
        self._rank = torch.full((len(x),), -torch.inf, device=x.device)
        self._gain = torch.full((len(x),), -torch.inf, device=x.device)

    @torch.no_grad()
    def offer(self, x_adv: Tensor, seen: Seen, gain: Tensor) -> None:
        """Take over the images (N, C, H, W) that got further than what is kept, by what was seen and gained (N,)."""
        rank = (seen.evaded.sum(1) * (seen.margin.shape[1] + 1) + seen.wrong.sum(1)).to(self._rank.dtype)
        further = (rank > self._rank) | ((rank == self._rank) & (gain > self._gain))
        self.x_adv = torch.where(further.reshape(-1, 1, 1, 1), x_adv, self.x_adv)
        self._rank = torch.where(further, rank, self._rank)
        self._gain = torch.where(further, gain, self._gain)
