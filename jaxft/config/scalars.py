"""Values of keys as they were written: a scalar keeps its source until the type of its key says what it is.

``data.text: 0`` names the column "0", ``train.seed: 0`` is a number: YAML alone cannot know. So the loader hands numbers,
booleans and null on as :class:`Scalar`, and :func:`settle` decides by the schema.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Literal, cast

import yaml

from jaxft.errors import UserError
from jaxft.files import MOST_DEPTH


@dataclass(frozen=True, slots=True)
class Scalar:
    """A YAML scalar that is not text by its form."""

    value: object
    source: str
    """The text in the file."""


def members(kind: object) -> tuple[object, ...]:
    """The types that a type annotation allows: those of a union, or itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def takes_text(kind: object) -> bool:
    """Whether a value of type ``kind`` may be text, and is no number or boolean."""
    texts = [one is str or _is_choice(one) for one in members(kind)]
    return any(texts) and not any(one in (int, float, bool, Any) for one in members(kind))


def _is_choice(kind: object) -> bool:
    return typing.get_origin(kind) is Literal and all(isinstance(value, str) for value in typing.get_args(kind))


def takes_none(kind: object) -> bool:
    """Whether null is a value of type ``kind``."""
    return any(one in (type(None), Any) for one in members(kind))


def item_kind(kind: object) -> object:
    """The type of the items of a list of type ``kind``; None: it takes no list."""
    return next((typing.get_args(one)[0] for one in members(kind) if typing.get_origin(one) is tuple), None)


def value_kind(kind: object) -> object:
    """The type of the values of a mapping of type ``kind``; None: it takes no mapping."""
    return next((typing.get_args(one)[1] for one in members(kind) if typing.get_origin(one) is dict), None)


def settle(kind: object, tree: object, where: str) -> object:
    """``tree`` without :class:`Scalar`: text where ``kind`` wants text, the value elsewhere.

    Raises:
      UserError: null where text must stand, or text that is not Unicode.
    """
    if isinstance(tree, Scalar):
        if tree.value is None and takes_text(kind) and not takes_none(kind):
            raise null_is_no_text(where)
        return tree.source if takes_text(kind) and tree.value is not None else tree.value
    if isinstance(tree, str):
        return _unicode(tree, where)
    if isinstance(tree, list):
        inner = item_kind(kind) or Any
        return [settle(inner, item, f"{where}.{i}") for i, item in enumerate(tree)]
    if not isinstance(tree, dict):
        return tree
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        return {key: settle(kinds.get(key, Any), value, f"{where}.{key}".strip(".")) for key, value in tree.items()}
    inner = value_kind(kind) or Any
    return {_unicode(key, where): settle(inner, value, f"{where}.{key}".strip(".")) for key, value in tree.items()}


def null_is_no_text(where: str) -> UserError:
    """The error for null as the value of a key that needs text."""
    more = " (tasks without labels ignore it: leave it out)" if where == "data.label" else ""
    return UserError(
        f'{where}=null: null means "none", and this key needs a value{more}; for the word itself put it in quotes: \'"null"\''
    )


def _unicode(text: object, where: str) -> object:
    """Text with pairs of surrogates, as JSON writes emoji, put together."""
    if not isinstance(text, str) or text.isascii() or not re.search("[\ud800-\udfff]", text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}={text!a}: is not valid UTF-8; correct it") from error


class Loader(yaml.SafeLoader):
    """SafeLoader that keeps the source of numbers, booleans and null (:class:`Scalar`), takes keys as they are written, reads
    ``1e-4`` as a number (YAML 1.1 wants ``1.0e-4``), and ``on``, ``off``, ``yes`` and ``no``, dates, ``10:13`` and ``010`` as
    text (YAML 1.1: booleans, objects, 613 in sixties, 8 in octal). Refuses a key given twice, and tags of other types.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._depth = 0
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """The next node, counted: an alias counts as all that it stands for."""
        event = self.peek_event()
        anchor, begun = str(getattr(event, "anchor", None)), self._nodes
        if isinstance(event, yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                raise _refused(f"&{anchor} holds itself", event)
            self._nodes += self._sizes.get(anchor, 0)
        self._nodes += 1
        self._depth += 1
        if self._nodes > MOST_NODES:
            raise _refused(f"more than {MOST_NODES:,} values, those that aliases repeat included", event)
        if self._depth > MOST_DEPTH:
            raise _refused(f"nested too deeply: more than {MOST_DEPTH} lists and mappings in each other", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._sizes[anchor] = self._nodes - begun
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """A mapping whose keys are texts."""
        self._names_of(node)
        self.flatten_mapping(node)  # `<<: *anchor`: what is merged comes first
        names = self._names_of(node, twice=True)
        return {
            name: self.construct_object(value, deep=deep) for name, (_, value) in zip(names, node.value, strict=True)
        }

    def _names_of(self, node: yaml.MappingNode, twice: bool = False) -> list[str]:
        names: dict[str, None] = {}
        found: list[str] = []
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused("a key is a list or mapping", key_node)
            if key_node.tag == _MERGE:
                continue
            made = self.construct_object(key_node)
            name = made.source if isinstance(made, Scalar) else made
            if name in names and not twice:
                raise _refused(f"key {name!r} is given twice", key_node)
            names[name] = None
            found.append(name)
        return found


MOST_BYTES = 1 << 20
"""Bytes of a run file: the largest of ours has 2 KB."""
MOST_NODES = 20_000
"""Keys, values and list items of a run file: a list of 20,000 labels takes two seconds to read."""


def _refused(problem: str, at: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, cast(yaml.error.Mark, at.start_mark))


_MERGE = "tag:yaml.org,2002:merge"
EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""Numbers such as 1e-4, which YAML 1.1 takes for text (it wants 1.0e-4)."""

_FORMS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*|0b[01][01_]*|0x[0-9a-fA-F][0-9a-fA-F_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|\.(?:inf|Inf|INF))(?:[eE][-+]?[0-9]+)?|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),
}


def _kept(name: str) -> Callable[[Loader, yaml.ScalarNode], Scalar]:
    construct = yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{name}"]

    def with_source(loader: Loader, node: yaml.ScalarNode) -> Scalar:
        try:
            return Scalar(construct(loader, node), node.value)
        except (ValueError, KeyError) as error:  # `!!int x`; a number of more than 4300 digits
            raise _refused(f"not a number: {error}", node) from error

    return with_source


Loader.yaml_implicit_resolvers = {}
for _name, (_form, _first) in _FORMS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_form})$"), _first)
Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))
_CONSTRUCTORS = yaml.SafeLoader.yaml_constructors
Loader.yaml_constructors = {
    None: _CONSTRUCTORS[None],
    **{f"tag:yaml.org,2002:{name}": _CONSTRUCTORS[f"tag:yaml.org,2002:{name}"] for name in ("map", "seq", "str")},
    **{f"tag:yaml.org,2002:{name}": _kept(name) for name in ("null", "bool", "int", "float")},
    _MERGE: yaml.SafeLoader.construct_scalar,  # as a value: the text "<<"
}


def parse_yaml(text: str, where: str) -> object:
    """The tree of a YAML document, with :class:`Scalar` in it.

    Raises:
      UserError: it is not valid YAML; says where.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{where:.200}: has {len(text):,} characters; at most {MOST_BYTES:,} are read as YAML")
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error).splitlines() or ["nested too deeply"])[0]
        more = "; indent with spaces, not tabs" if "'\\t'" in problem else ""
        raise UserError(f"{where}{line}: not valid YAML: {problem}{more}") from error
