"""What stands after ``key=`` on the command line, as a value of the key's declared type.

Text is taken as it is typed, whatever characters it has. Numbers, booleans, lists of numbers and mappings are YAML; what YAML
would drop or change without a word (comments, anchors, tags, folded lines) is refused.
"""

from __future__ import annotations

import re
from typing import cast

import yaml

from jaxft.config.scalars import item_kind, null_is_no_text, parse_yaml, takes_none, takes_text, value_kind
from jaxft.errors import UserError

_SINGLE = re.compile(r"'(?:[^']|'')*'", re.DOTALL)
_DOUBLE = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_PLAIN = re.compile(r"\s+|[^\s,\[\]{}][^,\[\]{}]*")
_REFUSED = (yaml.AnchorToken, yaml.AliasToken, yaml.TagToken, yaml.DirectiveToken)


def typed(kind: object, text: str, key: str) -> object:
    """The value of ``key``, of type ``kind``, that ``text`` says.

    Text keys take it literally, but for ``null`` where None is allowed and a whole quoted text, which loses its quotes (YAML's
    rules). Keys that take lists of texts read ``[a, b]``: items apart by commas, each taken in the same way.

    Raises:
      UserError: the text is empty or ambiguous, or YAML would not take all of it.
    """
    if text == "":
        none = "null for none, " if takes_none(kind) else ""
        quoted = "'\"\"' for an empty text" if takes_text(kind) else "a value"
        raise UserError(f"{key}= is empty: write {none}{quoted} (is a variable of the shell unset?)")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{key}={text!a}: is not valid UTF-8; correct it")
    inner, mapping = item_kind(kind), value_kind(kind) is not None and text.startswith("{")
    if inner is not None and takes_text(inner) and not mapping:
        if text.startswith("[") and text.endswith("]"):
            return [_text(inner, item, f"{key}={text}") for item in items_of(text[1:-1], f"{key}={text}")]
        if not takes_text(kind) and not (text == "null" and takes_none(kind)):
            raise UserError(f"{key}={text}: takes a list; write {key}=[{text}]")
    if takes_text(kind) and not mapping:
        return _text(kind, text, key)
    _refuse_losses(text, key)
    return parse_yaml(text, f"{key}={text}")


def _text(kind: object, text: str, where: str) -> str | None:
    if text == "null":
        if takes_none(kind):
            return None
        raise null_is_no_text(where)
    if _SINGLE.fullmatch(text):
        return text[1:-1].replace("''", "'")
    if _DOUBLE.fullmatch(text):
        if "\n" in text or "\r" in text:
            raise UserError(f"{where}: a line break in double quotes would be changed; write \\n for it, or no quotes")
        return cast(str, parse_yaml(text, where))
    return text


def items_of(text: str, where: str, brackets: str = "[]") -> list[str]:
    """The items of a list, still in their quotes. Commas count outside quotes and brackets, of which an even number opens and an
    odd number closes."""
    items, item, depth, at = [], "", 0, 0
    while at < len(text):
        quoted = None if item.strip() else _SINGLE.match(text, at) or _DOUBLE.match(text, at)
        plain = quoted or _PLAIN.match(text, at)
        piece = plain[0] if plain else text[at]
        depth += (1, -1)[brackets.index(piece) % 2] if piece in brackets else 0
        if depth < 0:
            break
        if piece == "," and depth == 0:
            items.append(item.strip())
            item = ""
        else:
            item += piece
        at += len(piece)
    if depth:
        raise UserError(f"{where}: brackets do not match; put items that hold one in quotes")
    items += [item.strip()] if item.strip() else []
    if "" in items:
        raise UserError(f"{where}: an item is empty; for an empty text write '\"\"'")
    return items


def _refuse_losses(text: str, key: str) -> None:
    """Raises UserError if YAML would leave out or change a part of ``text``."""
    end = 0
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            lost = text[end : token.start_mark.index].strip()
            if isinstance(token, _REFUSED):
                lost = text[token.start_mark.index : token.end_mark.index]
            if isinstance(token, yaml.ScalarToken) and token.start_mark.line != token.end_mark.line:
                lost = text[token.start_mark.index : token.end_mark.index]
            if lost:
                raise UserError(
                    f"{key}={text}: {lost!r} would be lost or changed (YAML's comments, anchors, tags, line breaks); "
                    "leave it out, or put the text in quotes"
                )
            end = token.end_mark.index
    except yaml.YAMLError:
        return  # parsing says what is wrong
    if text[end:].strip():
        raise UserError(f"{key}={text}: {text[end:].strip()!r} would be lost; leave it out, or put the text in quotes")
