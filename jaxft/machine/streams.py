"""Standard streams that a program was started without (``>&-``)."""

from __future__ import annotations

import os
import sys

closed: set[str] = set()
"""The streams that were closed when the program began."""


def open_closed_streams() -> None:
    """Opens closed standard streams, to nowhere; to be called before anything else is opened.

    Otherwise the first file that the program opens would take a stream's number, and get whatever a library prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - for as long as the program lasts
            closed.add(name)
