"""Model families: what one is (``contract``), what several share (``encoder``, ``heads``), and one file each (``families``).

There is no registry: a family is found by the name of its module, or by a ``model_type`` that it names.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from difflib import get_close_matches
from typing import cast

from jaxft.config.outside import outside_module
from jaxft.errors import UserError
from jaxft.models import families as _families
from jaxft.models.contract import Family

__all__ = ["families", "family", "model_types"]

_NEEDED = (
    *("MODEL_TYPES", "HEADS", "SUPERSEDED", "Config", "Model", "Model.facts", "TINY"),
    *("facts", "config_from_hf", "config_to_hf", "config_of_weights", "hf_layout"),
)


@functools.cache
def families() -> tuple[str, ...]:
    """The names of all model families."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(_families.__path__)))


@functools.cache
def model_types() -> dict[str, str]:
    """Every ``model_type`` of a config.json that is supported, and its family."""
    return {kind: name for name in families() for kind in _module(name).MODEL_TYPES}


def family(name: str) -> Family:
    """The module of a family: by its name, by the reference's ``model_type``, or a dotted name of a module that is somewhere
    else. That is imported: only names that a user gave may come here with a dot.

    Raises:
      UserError: there is no such family.
    """
    if "." in name:
        return cast(Family, outside_module("model.family", name, _NEEDED, "docs/add_a_model.md"))
    found = name if name in families() else model_types().get(name) or model_types().get(name.replace("_", "-"))
    if found is None:
        # Names of other families are as near to ours as slips are (albert, roberta): only what is no longer can be a slip.
        known = sorted({*families(), *model_types()})
        # Nor is a family another version of itself (deberta, deberta_v2).
        others = [one for one in known if len(one) >= len(name) and not one.startswith((f"{name}_", f"{name}-"))]
        near = get_close_matches(name.lower(), others, n=1, cutoff=0.8)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model family {name!r} is not supported; there are: {', '.join(families())}{guess}")
    return _module(found)


def _module(name: str) -> Family:
    return cast(Family, importlib.import_module(f"{_families.__name__}.{name}"))
