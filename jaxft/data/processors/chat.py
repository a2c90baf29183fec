"""Conversations as texts: the chat template of a model folder, in the sandbox of `transformers`.

A template is a program of the Jinja language that a folder brings along. The reference runs it in Jinja's sandbox, where it sees the
messages and nothing else of the process; so does this module, by calling the reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxft.data.processors.panics import first_line
from jaxft.errors import UserError
from jaxft.files import JsonObject, read_json_object, read_text

FILE = "chat_template.jinja"
REPLY = "assistant"
"""The role whose messages are the model's."""
Message = Mapping[str, object]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Rendered(NamedTuple):
    """A conversation as a text."""

    text: str
    replies: list[tuple[int, int]]
    """The first character of each reply, and the one after its last: what a model is to learn, with what ends the reply."""


class ChatTemplate:
    """How conversations are written for a model.

    Args:
      folder: with ``chat_template.jinja``, or a ``chat_template`` in ``tokenizer_config.json``.

    Raises:
      UserError: there is none, or it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = folder / "tokenizer_config.json"
        settings = read_json_object(path) if path.exists() else {}
        self._template = _template(folder, settings)
        self._special = {name: text for name in _SPECIAL if (text := _content(settings.get(name))) is not None}
        self._marked = _GENERATION.search(self._template) is not None

    def text(self, messages: Sequence[Message], *, reply: bool = False) -> str:
        """A conversation as a text.

        Args:
          messages: ``role`` and ``content`` of each.
          reply: whether what begins the model's reply follows.

        Raises:
          UserError: the template refuses the messages, or fails.
        """
        return self._rendered(messages, reply=reply)[0]

    def rendered(self, messages: Sequence[Message], *, first: int = 0) -> Rendered:
        """A conversation as a text, and where the model's replies are.

        They are what the template marks (``{% generation %}``); where it marks nothing, what each reply adds to the text of the messages
        before it.

        Args:
          first: the message from which on replies are told.

        Raises:
          UserError: as for :meth:`text`, or what a reply adds cannot be told.
        """
        if self._marked:
            text, replies = self._rendered(messages, marked=True)
            earlier = any(message.get("role") == REPLY for message in messages[:first])
            return Rendered(text, replies[len(self._rendered(messages[:first], marked=True)[1]) if earlier else 0 :])
        whole, replies = self.text(messages), []
        for number, message in enumerate(messages[first:], first):
            if message.get("role") == REPLY:
                before = self.text(messages[:number], reply=True)
                after = self.text(messages[: number + 1])
                if not whole.startswith(after) or not after.startswith(before):
                    raise UserError(
                        f"{self._folder}: its chat template writes earlier messages otherwise once others follow, so it cannot be told "
                        "which tokens are the model's; mark them in the template with {% generation %} ... {% endgeneration %}"
                    )
                replies.append((len(before), len(after)))
        return Rendered(whole, replies)

    def _rendered(
        self, messages: Sequence[Message], *, reply: bool = False, marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils import chat_template_utils  # seconds

        given: JsonObject = {"conversations": [[dict(message) for message in messages]], **self._special}
        try:
            texts, spans = chat_template_utils.render_jinja_template(
                chat_template=self._template, return_assistant_tokens_mask=marked, add_generation_prompt=reply, **given
            )
        except Exception as error:  # whatever code of others raises: Jinja's errors, and those of what it calls
            raise UserError(
                f"{self._folder}: its chat template does not take the messages: {first_line(error)}"
            ) from error
        return texts[0], [(int(start), int(stop)) for start, stop in spans[0]] if marked else []


def _template(folder: Path, settings: Mapping[str, object]) -> str:
    if (folder / FILE).exists():
        return read_text(folder / FILE)
    found = settings.get("chat_template")
    if isinstance(found, list):  # several by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise UserError(
            f"{folder}: its tokenizer has no chat template; put one into {FILE} there (Jinja, as transformers reads it)"
        )
    return found


def _content(token: object) -> str | None:
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def check_messages(messages: object, where: str) -> list[dict[str, str]]:
    """Messages of a conversation, checked.

    Raises:
      UserError: it is no list of objects with a ``role`` and a ``content``, both texts.
    """
    wanted = 'a conversation is a list of messages, [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {wanted}")
    for number, one in enumerate(messages):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str) or not isinstance(one.get("content"), str):
            raise UserError(f"{where}: message {number} has no role or no content that is text; {wanted}")
    return messages
