"""Prompts as texts, and the texts that follow them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import jax
import numpy as np
from jaxtyping import PyTree

from jaxft.config.generation import TOKENS, GenerationConfig
from jaxft.data.processors.chat import ChatTemplate, Message, check_messages
from jaxft.data.processors.continued import text_after, without_ends
from jaxft.data.processors.contract import AS_FILES_SAY, Languages
from jaxft.data.processors.languages import written_in_its_language
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.inference.predict import Served
from jaxft.models.decoding.by_layer import apart
from jaxft.models.decoding.decode import Generated, State, advance, begin, made_of, searched, writes
from jaxft.models.decoding.speculative import Draft, Speculation, begin_with_draft, check_draft, speculate

_LOOK = 16
"""Tokens that are made between two looks for strings that end a text, or between two pieces that are shown."""
_BROKEN = "�"  # bytes that are no whole letter yet


@dataclass(frozen=True)
class Continuation:
    """What follows a prompt."""

    text: str
    tokens: int
    """How many were made."""
    finish: Literal["stop", "length"]
    """``stop``: at a token or a string that ends texts; ``length``: there were as many tokens as asked for."""


Prompt = str | Sequence[Message]
"""A text, or the messages of a conversation."""


def _whole(served: Served, languages: Languages) -> Tokenizer:
    """The tokenizer of a model, cutting nothing off."""
    before = served.tokenizer.languages
    said = Languages(languages.source or before.source, languages.target or before.target)
    return Tokenizer(served.tokenizer.folder, None, model_type=served.family_name, languages=said)


class Writer:
    """A model that goes on with texts.

    Args:
      stop: strings that end a text.
      seed: of draws.
      chat: whether prompts are conversations, written by the model's chat template: a text is the message of a user.
      system: what conversations begin with that do not say it themselves.
      draft: a smaller model, of the same tokens, that proposes them.
      draft_tokens: how many it proposes at once.
      languages: that texts are marked with, where not as the model's files say.

    Raises:
      UserError: the model makes no texts, or has no chat template.
    """

    def __init__(
        self,
        served: Served,
        config: GenerationConfig,
        *,
        stop: Sequence[str] = (),
        seed: int = 0,
        chat: bool = False,
        system: str | None = None,
        draft: Served | None = None,
        draft_tokens: int = 5,
        languages: Languages = AS_FILES_SAY,
    ) -> None:
        if not writes(served.model):
            raise UserError(
                f"the model has the head {served.model.head}, which makes no texts: that needs a decoder's, for the next token"
            )
        if any(not text for text in stop):
            raise UserError("a string that ends texts must not be empty")
        if served.devices.mesh is not None and served.devices.batch_ways > 1:
            raise UserError("generate splits models, not batches: use mesh.tensor, and mesh.data=1 mesh.fsdp=1")
        self._served, self._stop, self._seed = served, tuple(stop), seed
        self._tokenizer = _whole(served, languages)
        config = written_in_its_language(config, self._tokenizer, anew=languages.target is not None)
        self._template, self._system = ChatTemplate(served.tokenizer.folder) if chat else None, system
        ends = config.eos_token_id
        count = served.model.facts.vocabulary or 0
        for name in TOKENS:
            said = getattr(config, name)
            for one in said if isinstance(said, tuple) else () if said is None else (said,):
                if one >= count:
                    raise UserError(f"{name}={one} is not among the model's {count} tokens")
        if not ends:  # BERT's vocabularies have a separator there
            special = self._tokenizer.special
            end = special.separator if special.end is None else special.end
            ends = () if end is None else (end,)
        self.config = dataclasses.replace(config, eos_token_id=ends)
        self._draft = None if draft is None else self._drafting(draft, draft_tokens)
        self._rounds = self._places = 0

    def draft_text(self) -> str | None:
        """How good the proposals of the draft were; None: there was none."""
        if self._draft is None or not self._rounds:
            return None
        each = self._places / self._rounds
        return f"draft: {each:.2f} tokens were kept each time that the model read {self._draft.tokens} proposals"

    def _drafting(self, served: Served, count: int) -> Draft:
        draft = Draft(served.model, served.params, count)
        check_draft(self._served.model, draft, self.config)
        if not writes(draft.model):
            raise UserError(f"the draft has the head {draft.model.head}, which makes no texts")
        if served.tokenizer.digest() != self._served.tokenizer.digest():
            raise UserError(
                f"the draft's tokenizer ({served.tokenizer.folder}) is not the model's ({self._served.tokenizer.folder}): the same ids "
                "would be other texts; take a draft with the same one"
            )
        return draft

    def write(self, prompts: Sequence[Prompt], batch_size: int) -> Iterator[Continuation]:
        """What follows each prompt, in their order; prompts of similar length are computed together, ``batch_size`` at once."""
        encoded = [self._encoded(text, number) for number, text in enumerate(prompts, 1)]
        order = np.argsort([len(ids) for ids in encoded], kind="stable")
        found: dict[int, Continuation] = {}
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size].tolist()
            for which, one in zip(chosen, self._batch([encoded[i] for i in chosen], batch_size), strict=False):
                found[which] = one
        return (found[i] for i in range(len(prompts)))

    def stream(self, prompt: Prompt) -> Iterator[str | Continuation]:
        """The text piece by piece as it is made, and the whole at the end."""
        ids, shown = self._encoded(prompt, 1), ""
        if self.config.num_beams > 1:  # the text may be another one until the last token
            (whole,) = self._batch([ids], 1)
            yield from (whole.text, whole) if whole.text else (whole,)
            return
        made = Generated([[]], [False])
        for state, first in self._parts([ids], 1, _LOOK):
            made = made_of(state, first, self.config)
            text, over = self._text(ids, made, 0)
            # What may still become another letter, or a string that ends the text, waits.
            safe = text if over else text[: len(text) - self._held_back(text)]
            if len(safe) > len(shown) and safe.startswith(shown):
                yield safe[len(shown) :]
                shown = safe
            if over:
                break
        text, _ = self._text(ids, made, 0)
        if text.startswith(shown) and text != shown:
            yield text[len(shown) :]
        yield self._continuation(ids, made, 0)

    def _encoded(self, prompt: Prompt, number: int) -> list[int]:
        ids, facts = self._ids_of(prompt, number), self._served.model.facts
        if facts.start is not None:
            if facts.limit is not None and len(ids) > facts.limit:
                raise UserError(
                    f"prompt {number} has {len(ids)} tokens, and the model reads {facts.limit} of a source: shorten it"
                )
            return ids
        ids = without_ends(ids, self.config.eos_token_id)
        if not ids:
            start = self._tokenizer.special.begin
            if start is None:
                raise UserError(f"prompt {number} has no tokens; begin with some text")
            return [start]
        limit = self._limit
        if limit is not None and len(ids) + self.config.max_new_tokens > limit:
            room = limit - len(ids)
            whose = "the model's limit" if self._draft is None else "what model and draft can read"
            what = f"set --max-new-tokens to {room} or less, or shorten it" if room > 0 else "shorten it"
            raise UserError(
                f"prompt {number} has {len(ids)} tokens, and {self.config.max_new_tokens} more are beyond {whose} of {limit}; "
                f"{what}"
            )
        return ids

    @property
    def _limit(self) -> int | None:
        """Tokens of a prompt and a text together, at most. A draft's proposals may go beyond the text, and are read, too."""
        if self._draft is None:
            return self._served.model.facts.limit
        limits = [one.facts.limit for one in (self._served.model, self._draft.model) if one.facts.limit is not None]
        return min(limits) - self._draft.tokens if limits else None

    def _parts(self, prompts: Sequence[Sequence[int]], rows: int, each: int) -> Iterator[tuple[State, int]]:
        """The state after so many tokens each, until all rows are done, with the place of the first token that was made. A state is used
        up by the next."""
        model, params, seed = self._served.model, self._served.params, self._seed
        begun: Speculation | None = None
        with self._mesh():
            if self._draft is None:
                state = begin(model, params, prompts, self.config, seed=seed, rows=rows)
            else:
                begun = begin_with_draft(model, params, self._draft, prompts, self.config, seed=seed, rows=rows)
                state = begun.state
        first = int(state.at)
        last = first + self.config.max_new_tokens
        for until in (*range(first + each, last, each), last):
            with self._mesh():
                if begun is None:
                    state = advance(model, self.config, self._params, state, until)
                else:
                    begun = self._speculated(begun, until)
                    state = begun.state
            yield state, first
            if bool(state.done.all()):
                return

    def _speculated(self, begun: Speculation, until: int) -> Speculation:
        assert self._draft is not None
        small, _, count = self._draft
        at, rounds = int(begun.state.at), int(begun.rounds)
        model, given = self._served.model, (self._params, self._draft_params)
        found = speculate(model, small, count, self.config, *given, begun, until)
        self._places += int(found.state.at) - at
        self._rounds += int(found.rounds) - rounds
        return found

    def _batch(self, prompts: Sequence[Sequence[int]], rows: int) -> list[Continuation]:
        if self.config.num_beams > 1:
            with self._mesh():
                begun = begin(self._served.model, self._served.params, prompts, self.config, seed=self._seed, rows=rows)
                made = searched(self._served.model, self.config, self._params, begun)
            return [self._continuation(ids, made, row) for row, ids in enumerate(prompts)]
        made = Generated([], [])
        for state, first in self._parts(prompts, rows, _LOOK if self._stop else self.config.max_new_tokens):
            made = made_of(state, first, self.config)
            if all(self._text(ids, made, row)[1] for row, ids in enumerate(prompts)):
                break
        return [self._continuation(ids, made, row) for row, ids in enumerate(prompts)]

    def _text(self, prompt: Sequence[int], made: Generated, row: int) -> tuple[str, bool]:
        """The text of a row so far, up to a string that ends it, and whether it is over."""
        text = self._decoded(prompt, made.tokens[row])
        at = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)
        return (text, made.ended[row]) if at is None else (text[:at], True)

    def _ids_of(self, prompt: Prompt, number: int) -> list[int]:
        if self._template is None:
            if not isinstance(prompt, str):
                raise UserError(f"prompt {number} is a conversation; --chat answers it")
            return list(self._tokenizer.encode([prompt])[0][0])
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        messages = check_messages(messages, f"prompt {number}")
        if self._system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        return self._tokenizer.plain([self._template.text(messages, reply=True)])[0][0]

    def _continuation(self, prompt: Sequence[int], made: Generated, row: int) -> Continuation:
        text, over = self._text(prompt, made, row)
        return Continuation(text, len(made.tokens[row]) + made.ended[row], "stop" if over else "length")

    def _decoded(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        if self._served.model.facts.start is not None:
            alone = self._tokenizer.decode(list(tokens))
            assert isinstance(alone, str)
            return alone
        return text_after(self._tokenizer, prompt, tokens)

    def _held_back(self, text: str) -> int:
        """How many of the last letters are not certain yet."""
        broken = len(text) - len(text.rstrip(_BROKEN))
        begun = (size for stop in self._stop for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size]))
        return max([broken, *begun])

    @cached_property
    def _params(self) -> PyTree[jax.Array]:
        return apart(self._served.model, self._served.params)

    @cached_property
    def _draft_params(self) -> PyTree[jax.Array]:
        assert self._draft is not None
        return apart(self._draft.model, self._draft.params)

    def _mesh(self) -> jax.set_mesh | nullcontext[None]:
        mesh = self._served.devices.mesh
        return nullcontext() if mesh is None else jax.set_mesh(mesh)
