"""Attacks that are crafted on one classifier and submitted to another."""

from dataclasses import replace

from torch import Tensor, nn

from defenses.attacks.attack import Attack


def transferred(attack: Attack, substitute: nn.Module) -> Attack:
    """Return the attack that is crafted on a substitute, whatever model it is run on (Papernot et al. 2017).

    ``substitute`` gives logits (N, K) for images (N, C, H, W) in [0, 1], in evaluation mode and on the images' device.
    It may be any classifier of the same classes, or one learnt from the answers of the very model that is attacked: see
    ``defenses.nip.substitute.distil``, to which a ``Victim`` can be given as it is. The name says what is transferred,
    and the facts that the model attacked is not asked while the examples are crafted.
    """

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack.run(substitute, x, y)

    facts = replace(attack.facts, sees="nothing", passes=0, paper="Papernot et al. 2017")
    return replace(attack, name=f"transfer-{attack.name}", run=run, facts=facts)
