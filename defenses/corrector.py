"""What every corrector is: it answers anew what was alerted."""

from typing import NamedTuple

from torch import Tensor, nn


class Corrected(NamedTuple):
    """What a corrector makes of M alerted images: ``logits`` (M, K) of ``purified`` (M, C, H, W) in [0, 1]."""

    logits: Tensor
    purified: Tensor


class Corrector(nn.Module):
    """Map purified images (M, C, H, W), their bare logits (M, K) and a scalar ``noise_scale`` to ``Corrected``.

    It is called with the alerted images alone, so that it may take several passes of the classifier, and in a graph of
    its own where it is served.
    """
