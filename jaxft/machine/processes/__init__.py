"""Several processes as one run: who takes part, how they find each other, what they agree on."""

from jaxft.machine.processes.agreement import anyone, barrier, fetch, first_says, is_first, raise_together
from jaxft.machine.processes.bring_up import at_step, behind, leave, start
from jaxft.machine.processes.cluster import Cluster, detect
from jaxft.machine.processes.letters import exchange, forget

__all__ = [
    "Cluster",
    "anyone",
    "at_step",
    "barrier",
    "behind",
    "detect",
    "exchange",
    "fetch",
    "first_says",
    "forget",
    "is_first",
    "leave",
    "raise_together",
    "start",
]
