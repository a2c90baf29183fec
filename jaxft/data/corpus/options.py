"""What a corpus depends on besides its sources and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxft.errors import UserError

Documents = Literal["line", "paragraph", "file"]
Invalid = Literal["refuse", "replace", "skip"]
Duplicates = Literal["keep", "exact", "near"]


@dataclass(frozen=True)
class Options:
    """Which texts become documents, and how."""

    text: str = "text"
    """Column of the text."""
    header: bool = True
    quotes: Literal["auto", "double", "none"] = "auto"
    missing_text: Literal["refuse", "skip"] = "refuse"
    documents: Documents = "line"
    """What is a document in .txt files: a line, what stands between blank lines, or the file."""
    invalid_utf8: Invalid = "refuse"
    """What becomes of lines that are not UTF-8: an error, replacement characters, or they are left out; counted in any case."""
    duplicates: Duplicates = "keep"
    """Which documents are left out because an earlier one is the same, or nearly."""
    eval_fraction: float | None = None
    """Share of the documents that is held out, chosen by what they say: copies are all on one side. None: none is."""
    part_bytes: int = 64 << 20
    """Bytes of a source that are tokenised to one shard, about."""

    def check(self) -> None:
        """Raises UserError if a number is out of range."""
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise UserError(f"--eval-fraction {self.eval_fraction}: must lie between 0 and 1")
        if not 1 << 10 <= self.part_bytes <= 1 << 34:
            raise UserError(f"--part-bytes {self.part_bytes}: must lie between {1 << 10} and {1 << 34}")

    @property
    def splits(self) -> tuple[str, ...]:
        """The folders that a build writes inside its own; empty: itself."""
        return ("",) if self.eval_fraction is None else ("train", "eval")
