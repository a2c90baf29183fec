"""jaxft: train, fine-tune and ship Transformers with JAX and Flax, Hugging Face weights in and out.

    >>> import jaxft
    >>> model, params, tokenizer = jaxft.load("path-or-hub-id")
    >>> model.apply({"params": params}, **tokenizer(["some text"])).logits
    >>> run = jaxft.train("run.yaml", overrides=["train.steps=50"])
    >>> run.metrics, run.params, run.folder

docs/python.md shows more.
Importing this package imports neither jax nor transformers: names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.cli.from_python import Trained, train
    from jaxft.config import RunConfig, load_config
    from jaxft.errors import UserError
    from jaxft.hub.pretrained import export_folder
    from jaxft.inference.load import Loaded, load
    from jaxft.layers import Compute

__version__ = "0.1.0"

_HOME = {
    "Compute": "layers",
    "Loaded": "inference.load",
    "RunConfig": "config",
    "Trained": "cli.from_python",
    "UserError": "errors",
    "export_folder": "hub.pretrained",
    "load": "inference.load",
    "load_config": "config",
    "train": "cli.from_python",
}

__all__ = [
    "Compute",
    "Loaded",
    "RunConfig",
    "Trained",
    "UserError",
    "__version__",
    "export_folder",
    "load",
    "load_config",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxft.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, loaded or not: for `dir`, `help` and completion."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
