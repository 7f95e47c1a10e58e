"""What every judge is: it says which logits are answered."""

import torch
from torch import Tensor, nn


class Judge(nn.Module):
    """Map the bare logits (N, K), those of the purified images (N, K) and the alerts (N,) bool to what is answered."""


class PurifiedAnswer(Judge):
    """Answer what the classifier says of the purified image."""

    def forward(self, undefended_logits: Tensor, logits: Tensor, alerts: Tensor) -> Tensor:
        return logits


class AlertedAnswer(Judge):
    """Answer what the classifier says of the purified image where that is alerted, and the bare answer elsewhere."""

    def forward(self, undefended_logits: Tensor, logits: Tensor, alerts: Tensor) -> Tensor:
        return torch.where(alerts.unsqueeze(1), logits, undefended_logits)
