"""A case of the zoo: a folder as people have it, and who says what is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One folder: how it is made, and how jaxft's outcome is judged."""

    name: str
    """Unique; slashes group it."""
    kind: str
    """Row of the table of counts."""
    make: Callable[[Path], None]
    """Fills an empty folder."""
    judge: Callable[[Path], str | None]
    """Runs jaxft and the reference on the folder. None: equal; text: what differs. A UserError is jaxft's refusal."""
    expect: str = "equal"
    """"equal", "refused" or "either"."""
    says: str = ""
    """Text that a refusal must contain."""
    quick: bool = False
    """Part of the cross-section that the normal test suite runs."""
