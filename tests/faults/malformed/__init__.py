"""Malformed inputs: hundreds of files and settings that are wrong, made by code from tiny sound ones.

Each must be refused in one line of at most 300 characters with the exit code of its kind, quickly, within a bound of memory, and
nothing may be written or executed.
"""

from __future__ import annotations

import functools
from collections import Counter

from faults.malformed import checkpoints, configs, data, runs, tokenizers, weights
from faults.malformed.case import Case

__all__ = ["Case", "all_cases"]


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """The battery, in order: by kind, then as the modules list them."""
    found = [case for module in (weights, configs, tokenizers, data, runs, checkpoints) for case in module.cases()]
    twice = [name for name, count in Counter(case.id for case in found).items() if count > 1]
    if twice:
        raise ValueError(f"two cases are called {twice[0]}")
    return tuple(found)
