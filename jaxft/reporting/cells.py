"""Texts in the columns of a terminal."""

from __future__ import annotations

import unicodedata


def cells_of(text: str) -> int:
    """Columns that a text takes in a terminal: East Asian wide characters take two, combining marks none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def fit(text: str, cells: int, align: str = "<") -> str:
    """``text`` cut or padded to exactly ``cells`` columns."""
    if cells_of(text) > cells:
        while text and cells_of(text) > cells - 1:
            text = text[:-1]
        text += "…"
    padding = " " * (cells - cells_of(text))
    return text + padding if align == "<" else padding + text
