"""One module per model family. There is no registry: a family is found by the name of its module.

A family module defines (see docs/add_a_model.md):

- ``Config``: frozen dataclass of everything that changes the maths;
- ``Model``: Linen module, ``Model(config, head, compute)``, ``head`` one of ``HEADS`` or None;
- ``HEADS``: head name -> the reference's architecture name;
- ``READ_AS``: further architecture names -> the head that is read of them;
- ``config_from_hf`` / ``config_to_hf``: to and from the reference's config.json;
- ``SUPERSEDED``: older keys of config.json for what ``config_to_hf`` writes, which an export leaves out;
- ``config_of_weights(weights)``: what the tensors alone say about the Config;
- ``hf_layout(config, head)``: the weight table, see :mod:`jaxft.hf`;
- ``TINY``: a Config small enough for tests.
"""

from __future__ import annotations

import importlib
import pkgutil
from difflib import get_close_matches
from types import ModuleType

from jaxft.config.outside import outside_module
from jaxft.errors import UserError

_NEEDED = (
    *("Config", "Model", "HEADS", "READ_AS", "SUPERSEDED", "TINY", "Model.INPUTS", "Model.CAUSAL"),
    *("config_from_hf", "config_to_hf", "config_of_weights", "head_of", "hf_layout"),
)


def families() -> tuple[str, ...]:
    """The names of all model families."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def family(name: str) -> ModuleType:
    """The module of a family: by its name, by the reference's ``model_type``, or a dotted name of a module that is somewhere
    else. That is imported: only names that a user gave may come here with a dot.

    Raises:
      UserError: there is no such family.
    """
    if "." in name:
        return outside_module("model.family", name, _NEEDED, "docs/add_a_model.md")
    module = name.replace("-", "_")
    if module not in families():
        # Names of other families are as near to ours as slips are (albert, roberta): only what is no longer can be a slip.
        near = get_close_matches(module.lower(), [f for f in families() if len(f) >= len(module)], n=1, cutoff=0.8)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"model family {name!r} is not supported; there are: {', '.join(families())}{guess}")
    return importlib.import_module(f"{__name__}.{module}")
