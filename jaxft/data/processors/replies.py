"""Prompts with their replies as tokens, and which of these are of a reply: texts, or messages that a chat template writes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from jaxft.data.processors.chat import REPLY, ChatTemplate, Message, check_messages
from jaxft.data.processors.contract import TextProcessor
from jaxft.errors import UserError

logger = logging.getLogger("jaxft.data")
_ANY = "a"  # a text that every vocabulary has some token for
Place = tuple[int, int]
"""The first character, and the one after the last."""


class Asked(NamedTuple):
    """A prompt with its reply."""

    prompt: object
    """A text, or a list of messages; None: the reply is all there is. Of a conversation, all messages of the model are then replies."""
    reply: object
    """A text, or a list of messages."""
    where: str
    """What messages call the row."""


class Replied(NamedTuple):
    """A prompt with its reply, as tokens."""

    ids: np.ndarray
    """[S] int32."""
    replies: np.ndarray
    """[S] int32, 1 for tokens of the reply."""
    dropped: int
    """Tokens that were cut off at the end."""


class Replies:
    """Encodes prompts with their replies for a model that goes on with texts.

    Texts are written one after the other, with what the tokenizer puts around texts and its end token, which are of the reply at the end.
    Messages are written by the chat template (:class:`~jaxft.data.processors.chat.ChatTemplate`), with nothing around them. What is longer
    than the tokenizer's ``max_length`` is cut at the end.
    """

    def __init__(self, tokenizer: TextProcessor) -> None:
        self._tokenizer, self._warned = tokenizer, False

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self._tokenizer.folder)

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer begins texts with, and what they end with."""
        ((whole, _, _),), ((inner, _),) = self._tokenizer.encode([_ANY]), self._tokenizer.plain([_ANY])
        first = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), len(whole))
        begin, end = whole[:first], whole[first + len(inner) :]
        last = self._tokenizer.special.end
        return begin, end if last is None or end[-1:] == [last] else [*end, last]

    def encode(self, asked: Sequence[Asked]) -> list[Replied]:
        """The tokens of some prompts with their replies.

        Raises:
          UserError: one is neither a text nor messages, or the chat template does not take them.
        """
        written = [self._written(*one) for one in asked]
        found = []
        for one, (ids, places), (_, spans, talk) in zip(
            asked, self._tokenizer.plain([text for text, _, _ in written]), written, strict=True
        ):
            if _begin_inside(places, spans) and not self._warned:
                self._warned = True
                logger.warning(
                    "%s: a reply begins inside a token (%s): asked for an answer, the model sees other tokens than it has learnt from; "
                    "let what comes before a reply end with a line break or a token of its own, not with a blank",
                    self._tokenizer.folder, one.where,
                )  # fmt: skip
            replies = _within(places, spans)
            if not talk:
                begin, end = self._around
                ids = [*begin, *ids, *end]
                replies = np.concatenate([np.zeros(len(begin)), replies, np.ones(len(end))])
            kept = len(ids) if self._tokenizer.max_length is None else min(len(ids), self._tokenizer.max_length)
            found.append(Replied(np.asarray(ids[:kept], np.int32), replies[:kept].astype(np.int32), len(ids) - kept))
        return found

    def _written(self, prompt: object, reply: object, where: str) -> tuple[str, list[Place], bool]:
        """The text, where its replies are, and whether it is a conversation."""
        if isinstance(prompt, str | None) and isinstance(reply, str):
            before = prompt or ""
            return before + reply, [(len(before), len(before) + len(reply))], False
        before = [] if prompt is None else _messages(prompt, "user", where)
        text, replies = self._template.rendered([*before, *_messages(reply, REPLY, where)], first=len(before))
        return text, replies, True


def _messages(given: object, role: str, where: str) -> Sequence[Message]:
    """Messages; a text is one of ``role``."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    return check_messages(given, where)


def shared_prompt(first: object, second: object, where: str) -> tuple[object, object, object]:
    """What two texts, or two conversations, begin with alike, and the rest of each, which is never empty.

    Texts are parted before the blank at which they first differ, since many vocabularies put a blank to the word that follows.

    Raises:
      UserError: one is a text and the other is not.
    """
    if isinstance(first, str) and isinstance(second, str):
        most = max(min(len(first), len(second)) - 1, 0)
        shared = next((i for i in range(most) if first[i] != second[i]), most)
        if shared > 0 and first[shared - 1] == " ":
            shared -= 1
        return first[:shared], first[shared:], second[shared:]
    if isinstance(first, str) or isinstance(second, str):
        raise UserError(f"{where}: one reply is a text and the other is a list of messages; write both alike")
    one, other = check_messages(first, where), check_messages(second, where)
    most = min(len(one), len(other)) - 1
    shared = next((i for i in range(most) if one[i] != other[i]), most)
    return one[:shared] or None, one[shared:], other[shared:]


def _within(places: Sequence[Place], spans: Sequence[Place]) -> np.ndarray:
    """[tokens] int32, 1 for tokens that have a character of a span."""
    begin, end = np.asarray(places, np.int64).reshape(-1, 2).T
    found = np.zeros(len(begin), np.int32)
    for start, stop in spans:
        found |= (begin < stop) & (end > start)
    return found


def _begin_inside(places: Sequence[Place], spans: Sequence[Place]) -> bool:
    """Whether a token holds the end of what begins a span, and the first of its letters."""
    starts = {start for start, _ in spans}
    return any(begin < start < end for begin, end in places for start in starts)
