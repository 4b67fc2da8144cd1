"""Services of one stage: a peer that has moved answers no more where it was.

Pure.
"""

from averaging.network import Network, Scoped


def at_stage(network: Network, stage: int) -> Network:
    """The same network, for what peers and trainers say to each other about `stage`."""
    return Scoped(network, str(stage))
