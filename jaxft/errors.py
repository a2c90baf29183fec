"""The one exception class that means "the user can fix this".

Everything raised as :class:`UserError` is printed by the command line as one line and ends the process with exit code 2,
without a traceback. Anything else that escapes is a bug in jaxft and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A problem in the user's input: says what is wrong, where, and what to do about it."""


def printable(text: str) -> str:
    """A text as it can be shown on one line: control and invisible characters escaped, but those that join letters."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode() for c in text)


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names on one line, the first ``most`` of them, and how many more there are."""
    all_names = list(names)
    more = f", ... ({len(all_names) - most:,} more)" if len(all_names) > most else ""
    shown = (printable(name) for name in all_names[:most])
    return ", ".join(name if len(name) <= 60 else f"{name[:59]}…" for name in shown) + more


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest valid name, or all of them if none is near."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid names: {listed(names)}" if names else "no names are valid here"
