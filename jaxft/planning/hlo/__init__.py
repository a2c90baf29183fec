"""Reads programs that XLA has compiled: what they compute, what they send, and what that costs on a TPU."""

from jaxft.planning.hlo.costs import Collective, Costs, costs_of

__all__ = ["Collective", "Costs", "costs_of"]
