"""What a battery of faults found: cases by kind, and every one that came out wrong."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """Counts of one battery."""

    name: str
    cases: Counter[str] = field(default_factory=Counter)
    """By kind."""
    wrong: list[str] = field(default_factory=list)
    """A line for each case that did not come out as it must."""
    figures: dict[str, float] = field(default_factory=dict)
    """What was measured besides, by name."""

    def count(self, kind: str, problem: str | None = None) -> None:
        """Counts a case; with a problem, one that came out wrong."""
        self.cases[kind] += 1
        if problem is not None:
            self.wrong.append(f"{self.name} {kind}: {problem}")

    def as_json(self) -> dict[str, object]:
        """For the report of all batteries."""
        return {
            "cases": self.cases.total(),
            "wrong": self.wrong,
            "kinds": dict(sorted(self.cases.items())),
            "figures": self.figures,
        }
