"""Which rows of a source are held out: a share of each label, or whole groups; a pure function of the seed and the rows."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jaxft.data.examples import stable_order
from jaxft.data.iterative import Incidence, deviations, stratified
from jaxft.data.labels import label_text
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError

_STREAM = 0x5EED
_PASSES = 20  # over all groups; few are moved after the first ones
_ANY = ""
"""What every row has that may have several labels: so that the parts have their shares of all rows. No label has this name."""

Labelling = int | Callable[[Row], Iterable[object]] | None
"""What rows are held out in equal shares by: the label at a place among a row's values, all the labels of a row, or nothing."""


def hold_out(
    rows: list[Row], shares: Mapping[str, float], seed: int, label: Labelling = -1, *, grouped: bool = False
) -> tuple[list[Row], dict[str, list[Row]], str]:
    """Rows split into those that are kept and, by name, those held out; see :meth:`Strata.held_out`. Each part is in the order of the rows.

    Args:
      grouped: rows of one ``group`` stay together.

    Returns:
      The rows that are kept, those held out, and a line that says how (:meth:`Strata.text`).
    """
    strata = Strata(label, grouped=grouped)
    for row in rows:
        strata.add(row)
    part = strata.held_out(shares, seed)
    found = {name: [rows[i] for i in np.flatnonzero(part == place)] for place, name in enumerate(shares, start=1)}
    return [rows[i] for i in np.flatnonzero(part == 0)], found, strata.text(part, shares)


class Strata:
    """Which labels and which group each row has, as numbers, for rows that need not stay in memory."""

    def __init__(self, label: Labelling, *, grouped: bool = False) -> None:
        self._label, self._grouped = label, grouped
        self._labels: dict[str, int] = {}
        self._groups: dict[str, int] = {}
        self._of_labels, self._of_groups = array("i"), array("i")  # labels of a row one after the other
        self._ends = array("q")  # of each row's, where rows may have several

    def add(self, row: Row) -> None:
        """The next row."""
        if callable(self._label):
            names = {_ANY, *map(label_text, self._label(row))}
            self._of_labels.extend(self._labels.setdefault(name, len(self._labels)) for name in sorted(names))
            self._ends.append(len(self._of_labels))
        else:
            name = "" if self._label is None else label_text(row.values[self._label])
            self._of_labels.append(self._labels.setdefault(name, len(self._labels)))
        if self._grouped:
            self._of_groups.append(self._groups.setdefault(row.group, len(self._groups)))

    def __len__(self) -> int:
        return len(self._ends) if callable(self._label) else len(self._of_labels)

    def held_out(self, shares: Mapping[str, float], seed: int) -> np.ndarray:
        """[rows] int8: 0 for rows that are kept, i for those of the i-th share.

        Without groups, each label loses its share, rounded to whole rows, and keeps one row at least; where rows have several, as
        nearly as :func:`~jaxft.data.iterative.stratified` finds it. With groups, no group is on two
        sides: in an order drawn by the seed, a group is taken, or given back, if that brings the rows of each label closer to their
        share (the sum over labels of squared distances, each over the label's rows), until no group does; if none ever did, the one
        that does the least harm is taken. One group at least is kept.

        Args:
          shares: of the rows, by the name of what holds them out: ``data.eval_fraction``.

        Raises:
          UserError: nothing would be held out.
        """
        if self._grouped:
            part = self._by_group(shares, seed)
        elif callable(self._label):
            part = stratified(self._incidence(), tuple(shares.values()), np.random.default_rng([seed, _STREAM]))
        else:
            part = self._by_label(shares, seed)
        for place, (key, share) in enumerate(shares.items(), start=1):
            if not (part == place).any():
                source = key.removesuffix("_fraction")
                raise UserError(f"{key}={share} holds out no row of {len(part)}; set {source}")
        return part

    def text(self, part: np.ndarray, shares: Mapping[str, float]) -> str:
        """How rows were held out, on one line."""
        if self._grouped:
            groups = np.frombuffer(self._of_groups, np.int32)
            sizes = [(len(np.unique(groups[part == i])), (part == i).mean()) for i in range(1, len(shares) + 1)]
            said = (
                f"{key.removeprefix('data.').removesuffix('_fraction')} {count} of {len(self._groups)} groups, {share:.1%} of the rows"
                for key, (count, share) in zip(shares, sizes, strict=True)
            )
            return f"held out by whole groups: {'; '.join(said)}"
        said = ", ".join(
            f"{share:g} for {key.removeprefix('data.').removesuffix('_fraction')}" for key, share in shares.items()
        )
        if not callable(self._label):
            return f"held out at random: {said}{' of each label' if self._label is not None else ''}"
        most = np.abs(deviations(self._incidence(), tuple(shares.values()), part)).max()
        return f"held out by labels: {said} of each of {len(self._labels) - 1:,} labels, to {most:.1f} rows"

    def _incidence(self) -> Incidence:
        return Incidence(
            _by_name(self._labels, self._of_labels), np.frombuffer(self._ends, np.int64), len(self._labels)
        )

    def _by_label(self, shares: Mapping[str, float], seed: int) -> np.ndarray:
        numbers = np.array(self._of_labels, np.int32)
        order = stable_order(numbers)
        of_labels = np.split(order, np.cumsum(np.bincount(numbers, minlength=len(self._labels)))[:-1])
        rng = np.random.default_rng([seed, _STREAM])
        part = np.zeros(len(numbers), np.int8)
        for name in sorted(self._labels):
            members = of_labels[self._labels[name]]
            mixed, first = rng.permutation(members), 0
            for place, share in enumerate(shares.values(), start=1):
                count = min(round(share * len(members)), len(members) - 1 - first)
                part[mixed[first : first + count]] = place
                first += count
        return part

    def _by_group(self, shares: Mapping[str, float], seed: int) -> np.ndarray:
        # By their names, so that neither the order of the rows nor that in which sums are made matters.
        labels, groups = _by_name(self._labels, self._of_labels), _by_name(self._groups, self._of_groups)
        each = np.repeat(groups, np.diff(self._ends, prepend=0)) if callable(self._label) else groups
        pairs, counts = np.unique(each.astype(np.int64) * len(self._labels) + labels, return_counts=True)
        begins = np.searchsorted(pairs, np.arange(len(self._groups) + 1, dtype=np.int64) * len(self._labels))
        of_pairs, totals = pairs % len(self._labels), np.bincount(labels, minlength=len(self._labels))
        order = np.random.default_rng([seed, _STREAM]).permutation(len(self._groups)).tolist()
        sides, kept = np.zeros(len(self._groups), np.int8), len(self._groups)
        for place, share in enumerate(shares.values(), start=1):
            missing = share * totals
            least, spared = (np.inf, -1), 1 + len(shares) - place  # a group for each later share, and one to keep
            for _ in range(_PASSES):
                changed = False
                for group in (one for one in order if sides[one] in (0, place)):
                    span = slice(begins[group], begins[group + 1])
                    there, held = of_pairs[span], sides[group] == place
                    rows = -counts[span] if held else counts[span]
                    worse = float((rows * (rows - 2 * missing[there]) / totals[there]).sum())
                    if not held:
                        least = min(least, (worse, group))
                    if worse < 0 and (held or kept > spared):
                        missing[there] -= rows
                        sides[group], changed = 0 if held else place, True
                        kept += 1 if held else -1
                if not changed:
                    break
            if kept > spared and not (sides == place).any():
                sides[least[1]], kept = place, kept - 1
        return sides[groups]


def _by_name(numbers: Mapping[str, int], rows: array[int]) -> np.ndarray:
    """[rows] int32: the place of each row's name among all of them, sorted."""
    places = np.empty(len(numbers), np.int32)
    places[[numbers[name] for name in sorted(numbers)]] = np.arange(len(numbers))
    return places[np.frombuffer(rows, np.int32)] if len(rows) else np.zeros(0, np.int32)
