"""What transcripts begin with and are made of, under the names of a Whisper folder's ``generation_config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxft.config.generation import GenerationConfig
from jaxft.errors import UserError, nearest

SpeechTask: TypeAlias = Literal["transcribe", "translate"]


@dataclass(frozen=True)
class Timestamps:
    """Which tokens are times, and the rules that transcripts with times follow (Radford et al. 2022)."""

    none: int
    """The token that says that there are none; the next one is 0.00 s, each one after it 0.02 s more."""
    end: int
    """The token that ends a transcript; those before it are of texts."""
    latest_first: int | None = None
    """How many steps of 0.02 s a transcript may begin with at most; None: any."""

    @property
    def first(self) -> int:
        """The token of 0.00 s."""
        return self.none + 1


@dataclass(frozen=True)
class SpeechGeneration(GenerationConfig):
    """How a transcript is written."""

    timestamps: Timestamps | None = None
    """With times; None: without."""


@dataclass(frozen=True)
class SpeechTokens:
    """The tokens that a transcript begins with, as a folder says."""

    start: int
    """``<|startoftranscript|>``."""
    end: int
    """``<|endoftext|>``."""
    no_timestamps: int | None = None
    """``<|notimestamps|>``; None: the folder knows no times."""
    previous: int | None = None
    """``<|startofprev|>``, before what was said before."""
    languages: tuple[tuple[str, int], ...] = ()
    """Codes as ``en``, and their tokens."""
    tasks: tuple[tuple[str, int], ...] = ()
    forced: tuple[int | None, ...] = ()
    """What comes behind the start where neither language nor task is asked for; None: the language that is heard."""
    multilingual: bool = True
    latest_first: int | None = None
    """``max_initial_timestamp_index``."""

    @classmethod
    def from_json(cls, tree: Mapping[str, object], start: int, where: str) -> SpeechTokens:
        """The tokens of a generation_config.json.

        Args:
          start: what the model's texts begin with, where the file does not say.

        Raises:
          UserError: something is no token's id.
        """

        def token(name: str) -> int | None:
            said = tree.get(name)
            if said is not None and (type(said) is not int or said < 0):
                raise UserError(f"{where}: {name}={said!r}: must be a token's id")
            return said

        def table(name: str) -> tuple[tuple[str, int], ...]:
            said = tree.get(name) or {}
            if not isinstance(said, dict) or any(type(one) is not int or one < 0 for one in said.values()):
                raise UserError(f"{where}: {name} must be an object of tokens' ids")
            return tuple((str(key).strip("<|>"), one) for key, one in said.items())

        ends = tree.get("eos_token_id")
        ends = ends[:1] if isinstance(ends, list) else [ends]
        if not ends or type(ends[0]) is not int:
            raise UserError(
                f"{where}: eos_token_id={tree.get('eos_token_id')!r}: must be the token that ends transcripts"
            )
        stated = token("decoder_start_token_id")
        return cls(
            start=start if stated is None else stated,
            end=ends[0],
            no_timestamps=token("no_timestamps_token_id"),
            previous=token("prev_sot_token_id"),
            languages=table("lang_to_id"),
            tasks=table("task_to_id"),
            forced=_forced(tree.get("forced_decoder_ids"), where),
            multilingual=tree.get("is_multilingual") is not False,
            latest_first=token("max_initial_timestamp_index"),
        )

    @property
    def timestamps(self) -> Timestamps:
        """The rules of transcripts with times.

        Raises:
          UserError: the folder knows no times.
        """
        if self.no_timestamps is None:
            raise UserError(
                "generation_config.json has no no_timestamps_token_id: this model writes no times; ask for none"
            )
        return Timestamps(self.no_timestamps, self.end, self.latest_first)

    def hears_languages(self, language: str | None, task: str | None) -> bool:
        """Whether a prompt's language is what the model hears."""
        forced = self.forced[:1] if task is None else ()
        return bool(self.languages) and language is None and forced in ((), (None,))

    def language(self, said: str) -> int:
        """The token of a language: a code (``de``), a token (``<|de|>``) or an English name (``german``).

        Raises:
          UserError: the model has no such language.
        """
        code, known = said.lower().strip("<|>"), dict(self.languages)
        if code not in known:
            from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE  # slow, and for names alone

            code = TO_LANGUAGE_CODE.get(code, code)
        if code not in known:
            raise UserError(f"language {said!r} is not one of the model's: {nearest(code, list(known))}")
        return known[code]

    def prompt(
        self, language: str | int | None = None, task: str | None = None, *, timestamps: bool = False
    ) -> tuple[int, ...]:
        """What a transcript begins with.

        Args:
          language: a name or a code, or the token that was heard.
          task: ``transcribe``, or ``translate`` into English; None: as the folder says.
          timestamps: whether it has times.

        Raises:
          UserError: the model has no such language or task, or hears one language alone.
        """
        if not self.multilingual and (language is not None or task is not None):
            raise UserError("this model hears English alone: leave out language and task")
        stated = isinstance(language, str)
        made: list[int | None] = [self.start]
        if task is None and not stated:
            made += self.forced
        if language is not None:
            token = self.language(language) if isinstance(language, str) else language
            made[1:2] = [token]
        kinds = dict(self.tasks)
        if task is not None:
            if task not in kinds:
                raise UserError(f"task {task!r} is not one of the model's: {nearest(task, list(kinds))}")
            made.append(kinds[task])
        elif stated and "transcribe" in kinds:
            made.append(kinds["transcribe"])
        if timestamps:
            made = made[:-1] if made[-1] == self.timestamps.none else made
        elif self.no_timestamps is not None and made[-1] != self.no_timestamps:
            made.append(self.no_timestamps)
        return tuple(one for one in made if one is not None)


def _forced(said: object, where: str) -> tuple[int | None, ...]:
    """Tokens at the places 1, 2, ..."""
    pairs = said if isinstance(said, list) else []
    found: list[int | None] = []
    for place, pair in enumerate(pairs, 1):
        fits = isinstance(pair, list) and len(pair) == 2 and pair[0] == place
        if not fits or not (pair[1] is None or type(pair[1]) is int):
            raise UserError(f"{where}: forced_decoder_ids={said!r}: must be [[1, token], [2, token], ...]"[:300])
        found.append(pair[1])
    return tuple(found)
