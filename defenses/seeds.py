"""Seeds that are drawn from others."""

import numpy as np


def derived_seed(*parts: int) -> int:
    """Return a seed of 32 bits that depends on each of several whole numbers of 0 or more, and on their order.

    Torch's generator on the CPU looks at the lowest 32 bits of a seed and at no others.
    """
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
