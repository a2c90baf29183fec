"""``data.label_map`` for labels of words: entities get other names or are taken off, whatever says where in them a word stands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jaxft.data.labels import label_text
from jaxft.data.row_rules import label_map
from jaxft.errors import UserError, nearest

ENTITY_MARKS = ("B-", "I-", "E-", "S-")
"""What a tag begins with that says where in an entity its word stands."""
OUTSIDE = "O"


class TagNames:
    """Other names for labels of words; counts what they did.

    A name means a tag as it is written (``NN``, ``B-PER``), or else the entity of tags and of stretches of characters (``PER``): their
    marks stay. What has no name is in no entity any more: its words have the tag ``O``, and its stretches are left out.
    """

    def __init__(self, declared: Mapping[str, str | None] | None) -> None:
        self._map = label_map(declared)
        self._counts = dict.fromkeys(self._map, 0)
        self._others: dict[str, None] = {}  # in the order in which they came

    def of_tags(self, tags: Sequence[object], where: str) -> Sequence[object]:
        """The tags of a row's words under their new names."""
        return [self._tag(tag, where) for tag in tags] if self._map else tags

    def of_spans(self, spans: Sequence[object]) -> Sequence[object]:
        """A row's stretches of characters under their new names, without those that are taken off; malformed ones are for others to
        refuse."""
        return list(self._kept(spans)) if self._map else spans

    def _kept(self, spans: Sequence[object]) -> Iterator[object]:
        for span in spans:
            name = label_text(span.get("label")) if isinstance(span, Mapping) else ""
            if not isinstance(span, Mapping) or not self._counted(name):
                yield span
            elif (to := self._map[name]) not in (None, OUTSIDE):
                yield {**span, "label": to}

    def _tag(self, tag: object, where: str) -> object:
        name = label_text(tag)
        mark, entity = (name[:2], name[2:]) if name.startswith(ENTITY_MARKS) else ("", name)
        if name in self._map:
            mark, entity = "", name
        if not self._counted(entity):
            return tag
        to = self._map[entity]
        if to is None or to == OUTSIDE:
            return OUTSIDE
        if mark and to.startswith(ENTITY_MARKS):
            raise UserError(
                f"{where}: data.label_map: {entity!r} is an entity, whose words keep what stands before it ({name!r}); "
                f"call it {to[2:]!r}, not {to!r}"
            )
        return mark + to

    def _counted(self, name: str) -> bool:
        if name in self._counts:
            self._counts[name] += 1
            return True
        if len(self._others) < _MOST_OTHERS:
            self._others[name] = None
        return False

    def lines(self) -> Iterator[str]:
        """What was done, a line for each name.

        Raises:
          UserError: a name that no word had.
        """
        for name, count in self._counts.items():
            if not count:
                raise UserError(
                    f"data.label_map.{name}: no training row has this label: {nearest(name, list(self._others))}"
                )
            to = self._map[name]
            done = f"is {to!r}" if to not in (None, OUTSIDE) else f"is taken off ({OUTSIDE})"
            yield f"data.label_map: {name!r} {done} {count:,} times"


_MOST_OTHERS = 1000
"""Labels that are remembered, for messages."""
