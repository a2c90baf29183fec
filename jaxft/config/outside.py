"""Modules outside of jaxft that a configuration names: a task (``task.name=mypkg.mytask``) or a family of models of one's own.

Only names that a user gives are imported, in a run file, on the command line or from Python, and those that a run's own folder
has kept of them. What a model's config.json or a data set says never is.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jaxft.errors import UserError


def outside_module(key: str, name: str, needed: Sequence[str], page: str) -> ModuleType:
    """The module that ``key=name`` names.

    Args:
      key: of the configuration, for messages.
      name: dotted.
      needed: what it must define; ``Task.head`` for an attribute of what it defines.
      page: of the documentation, which says more.

    Raises:
      UserError: there is no such module, it cannot be imported, or lacks something.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{key}={name!r}: not the name of a module, such as mypkg.mymodule")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{key}={name}: cannot be imported: {error}") from error
        raise UserError(
            f"{key}={name}: there is no module {error.name!r} here; pip install its package, or put the folder that holds it "
            "into PYTHONPATH"
        ) from error
    except Exception as error:  # whatever code of others raises is theirs to mend
        at = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{key}={name}: cannot be imported: {type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"
        ) from error
    lacking = [attribute for attribute in needed if not _has(module, attribute)]
    if lacking:
        where = module.__file__ or "a package without an __init__.py"
        raise UserError(f"{key}={name}: {where} lacks {', '.join(lacking)}; {page} says what they are")
    return module


def _has(module: ModuleType, attribute: str) -> bool:
    found: object = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True
