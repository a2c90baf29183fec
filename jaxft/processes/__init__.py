"""Several processes as one run: who takes part, how they find each other, what they agree on."""

from jaxft.processes.agreement import anyone, barrier, fetch, first_says, is_first, raise_together
from jaxft.processes.bring_up import start
from jaxft.processes.cluster import Cluster, detect

__all__ = [
    "Cluster",
    "anyone",
    "barrier",
    "detect",
    "fetch",
    "first_says",
    "is_first",
    "raise_together",
    "start",
]
