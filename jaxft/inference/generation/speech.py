"""Transcripts of recordings of any length: stretch by stretch, each beginning where the last time of the one before says, and written again
with more chance where a transcript is not to be believed (Radford et al. 2022, section 4.5). What is done and its order is the reference's.

Dims: P frames of a stretch, C bins of frequency.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float32, PyTree

from jaxft.config.speech import SpeechGeneration, SpeechTokens
from jaxft.data.processors.log_mel import LogMel
from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.hub.source import Note, read_json
from jaxft.inference.generation.chunks import chunks_of, merged
from jaxft.inference.generation.stored import FILE, stored_generation
from jaxft.models.contract import Model
from jaxft.models.decoding.by_layer import apart
from jaxft.models.decoding.speech import Heard, hear, write, writes_speech

STEP = 0.02
"""Seconds from one token of times to the next."""
FRAMES_OF_STEP = 2
"""How many frames lie between them."""
FALLBACK = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Temperatures of one try after another."""
_DRAWN_FROM = 50
"""Tokens that are drawn from, as the reference does where it is not told otherwise."""
_CERTAIN = 0.5
"""From this temperature on, what was written is no help for what follows."""


@dataclass(frozen=True)
class Listening:
    """How recordings are transcribed."""

    language: str | None = None
    """A code, or an English name; None: what is heard."""
    task: str | None = None
    """``transcribe``, or ``translate`` into English; None: as the model's folder says."""
    timestamps: bool = True
    """Times at which segments begin and end; longer recordings need them."""
    temperatures: tuple[float, ...] = (0.0,)
    """Temperatures of one try after another, as long as a transcript is not to be believed; 0: the most probable tokens (``FALLBACK``)."""
    compression_ratio_threshold: float | None = None
    """A transcript whose tokens zlib makes smaller than by this factor says the same again and again: tried again."""
    logprob_threshold: float | None = None
    """So is one whose tokens' mean log-probability is below this."""
    no_speech_threshold: float | None = None
    """A stretch of which silence is more probable than this, and whose transcript is below ``logprob_threshold``, has none."""
    condition_on_previous: bool = False
    """What was said before stands before each stretch's transcript."""
    seed: int = 0
    """The seed of draws."""

    def __post_init__(self) -> None:
        if not self.temperatures or any(not 0 <= one < math.inf for one in self.temperatures):
            raise UserError(f"temperatures={self.temperatures}: one at least, each a number from 0 on")
        if self.no_speech_threshold is not None and self.logprob_threshold is None:
            raise UserError("no_speech_threshold needs logprob_threshold: a stretch has no speech where both say so")


@dataclass(frozen=True)
class Segment:
    """A part of a transcript."""

    start: float
    end: float
    """Seconds of the recording."""
    tokens: tuple[int, ...]
    """Times among them, where there are any."""
    score: float
    """The mean log-probability of its stretch's tokens."""
    no_speech: float | None
    """How probable silence was; None: the model has no token for it."""
    temperature: float
    """That of the last try."""


@dataclass(frozen=True)
class Transcript:
    """What a recording says."""

    segments: tuple[Segment, ...]
    language: str | None
    """The language that was asked for or heard, as the folder calls it; None: the model knows but one."""

    @property
    def tokens(self) -> list[int]:
        """The tokens of the whole, one after the other."""
        return [token for segment in self.segments for token in segment.tokens]


def stored_speech(folder: Path, start: int, note: Note) -> tuple[SpeechTokens, JsonObject]:
    """What a folder's transcripts begin with, and what it says of :class:`SpeechGeneration`'s other fields.

    Args:
      start: what the model's texts begin with, where generation_config.json does not say.

    Raises:
      UserError: the file is missing or malformed.
    """
    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{path} is missing: it says which tokens are languages, tasks and times")
    return SpeechTokens.from_json(read_json(path), start, str(path)), stored_generation(folder, note, two_sides=True)


class Listener:
    """A model that transcribes recordings.

    Args:
      log_mel: how the model's frames are made.
      tokens: what its transcripts begin with.
      config: how tokens are chosen; ``do_sample``, ``temperature`` and ``timestamps`` are those of ``how``. ``max_new_tokens`` of a stretch
        is made less where the model has no room for so many.

    Raises:
      UserError: the model writes no transcripts, reads other frames, or what is asked for is nothing that it knows.
    """

    def __init__(
        self,
        model: Model,
        params: PyTree[jax.Array],
        log_mel: LogMel,
        tokens: SpeechTokens,
        config: SpeechGeneration,
        how: Listening,
    ) -> None:
        if not writes_speech(model):
            raise UserError(f"a model with the head {model.head} writes no transcripts of sound")
        wanted = model.facts.inputs["frames"].axes[1:]
        if (log_mel.frames, log_mel.feature_size) != wanted:
            raise UserError(
                f"preprocessor_config.json makes {log_mel.frames} frames of {log_mel.feature_size} bins, and the model reads "
                f"{wanted[0]} of {wanted[1]}"
            )
        self._model, self._params, self._apart = model, params, apart(model, params)
        self._mel, self._tokens, self._how = log_mel, tokens, how
        self._hears = tokens.hears_languages(how.language, how.task)
        first = tokens.languages[0][1] if self._hears else None
        own = tokens.prompt(how.language if first is None else first, how.task, timestamps=how.timestamps)
        limit, before = model.facts.limit or config.max_new_tokens + len(own), 0
        self._kept = limit // 2 - 1  # tokens of what was said before
        if how.condition_on_previous:
            before = self._kept + 1
        room = limit - before - len(own)
        if room < 1:
            raise UserError(f"the model's limit of {limit} positions leaves no room for a transcript")
        self._config = dataclasses.replace(
            config,
            max_new_tokens=min(config.max_new_tokens, room),
            min_new_tokens=min(config.min_new_tokens, room),
            timestamps=tokens.timestamps if how.timestamps else None,
            eos_token_id=config.eos_token_id or (tokens.end,),
            do_sample=False,
        )

    def transcribe(self, recordings: Sequence[Float32[np.ndarray, " N"]]) -> list[Transcript]:
        """What recordings say, heard together; of any length, at the rate of ``log_mel``.

        Raises:
          UserError: a recording is longer than a stretch, and no times are asked for.
        """
        frames = [self._frames(one, number) for number, one in enumerate(recordings, 1)]
        prompts = self._prompts(frames)
        found: list[list[Segment]] = [[] for _ in frames]
        seeks, helps = [0] * len(frames), [self._how.condition_on_previous] * len(frames)
        while any(seek < len(one) for seek, one in zip(seeks, frames, strict=True)):
            for row, tries in enumerate(self._stretches(frames, seeks, prompts, found, helps)):
                if tries is None:
                    continue
                helps[row] = self._how.condition_on_previous and tries.temperature < _CERTAIN
                count = min(len(frames[row]) - seeks[row], self._mel.frames)
                step = count
                if not tries.silent:
                    segments, step = _segments(tries, seeks[row], count, self._tokens, self._how.timestamps)
                    found[row] += segments
                seeks[row] += step
        languages = [self._named(prompt) for prompt in prompts]
        return [Transcript(tuple(one), language) for one, language in zip(found, languages, strict=True)]

    def in_chunks(
        self,
        recording: Float32[np.ndarray, " N"],
        *,
        seconds: float = 30.0,
        overlap: float | None = None,
        rows: int = 8,
    ) -> Transcript:
        """What a recording says, of chunks that overlap and are heard by themselves: faster than stretch by stretch, less certain where
        they meet, without times.

        Args:
          seconds: of a chunk. overlap: seconds at each of its ends; None: a sixth.
          rows: chunks that are heard together.

        Raises:
          UserError: times are asked for, or chunks are longer than a stretch or overlap whole.
        """
        if self._how.timestamps:
            raise UserError("chunks are put together by their words: ask for no times, or leave out the chunks")
        parts = chunks_of(len(recording), self._mel.sampling_rate, seconds, overlap, self._mel.chunk_length)
        made: list[Transcript] = []
        for first in range(0, len(parts), rows):
            made += self.transcribe([recording[start:stop] for start, stop in parts[first : first + rows]])
        texts = [[token for token in one.tokens if token < self._tokens.end] for one in made]
        segments = [segment for one in made for segment in one.segments]
        whole = Segment(
            0.0,
            len(recording) / self._mel.sampling_rate,
            tuple(merged([text for text in texts if text])),
            min(one.score for one in segments) if segments else 0.0,
            None,
            max(one.temperature for one in segments) if segments else 0.0,
        )
        return Transcript((whole,), made[0].language if made else None)

    def _frames(self, recording: Float32[np.ndarray, " N"], number: int) -> Float32[np.ndarray, "_ C"]:
        if len(recording) <= self._mel.samples:
            return self._mel(recording)
        if not self._how.timestamps:
            raise UserError(
                f"recording {number} has {len(recording) / self._mel.sampling_rate:.0f} s, and the model hears {self._mel.chunk_length} at "
                "once: ask for times, by which it goes on, or for chunks"
            )
        return self._mel.whole(recording)

    def _prompts(self, frames: list[Float32[np.ndarray, "_ C"]]) -> list[tuple[int, ...]]:
        how, tokens = self._how, self._tokens

        def prompt(language: str | int | None) -> tuple[int, ...]:
            return tokens.prompt(language, how.task, timestamps=how.timestamps)

        if not self._hears:
            return [prompt(how.language)] * len(frames)
        heard = self._heard([one[: self._mel.frames] for one in frames], [(tokens.start,)] * len(frames), 1)
        known = np.array([token for _, token in tokens.languages])
        return [prompt(int(known[row])) for row in np.asarray(heard.first)[:, known].argmax(-1)]

    def _heard(
        self, stretches: Sequence[Float32[np.ndarray, "_ C"]], prompts: Sequence[Sequence[int]], own: int
    ) -> Heard:
        batch = np.zeros((len(stretches), self._mel.frames, self._mel.feature_size), np.float32)
        for row, one in enumerate(stretches):
            batch[row, : len(one)] = one
        return hear(self._model, self._params, batch, prompts, self._config, own=own, seed=self._how.seed)

    def _stretches(
        self,
        frames: list[Float32[np.ndarray, "_ C"]],
        seeks: list[int],
        prompts: list[tuple[int, ...]],
        found: list[list[Segment]],
        helps: list[bool],
    ) -> Iterator[_Try | None]:
        """The transcript of each recording's next stretch; None: it has no further one."""
        how, count = self._how, self._mel.frames
        stretches = [one[seek : seek + count] for one, seek in zip(frames, seeks, strict=True)]
        begun = [
            (*self._said(segments), *prompt) if helped and segments else prompt
            for segments, prompt, helped in zip(found, prompts, helps, strict=True)
        ]
        heard = self._heard(stretches, begun, len(prompts[0]))
        done, tries = [not len(one) for one in stretches], [None] * len(frames)
        results: list[_Try | None] = list(tries)
        silence = None
        if self._tokens.no_timestamps is not None:
            silence = np.asarray(heard.first)[:, self._tokens.no_timestamps - 1]
        for temperature in how.temperatures:
            written = write(self._model, self._at(temperature), self._apart, heard, done)
            for row in (row for row, over in enumerate(done) if not over):
                quiet = None if silence is None else float(silence[row])
                one = _Try(tuple(written.tokens[row]), written.ended[row], written.scores[row], quiet, temperature)
                results[row], done[row] = self._judged(one)
            if all(done):
                break
        yield from results

    def _at(self, temperature: float) -> SpeechGeneration:
        """How tokens are chosen at a temperature."""
        if temperature == 0:
            return self._config
        drawn = {"do_sample": True, "temperature": temperature, "num_beams": 1}
        return dataclasses.replace(self._config, **drawn, top_k=self._config.top_k or _DRAWN_FROM)

    def _judged(self, one: _Try) -> tuple[_Try, bool]:
        """(a try, whether it is the last)."""
        how, again = self._how, False
        if how.compression_ratio_threshold is not None:
            tokens = (*one.tokens, *self._config.eos_token_id[:1]) if one.ended else one.tokens
            again = compression_ratio(tokens, self._model.facts.vocabulary or 1) > how.compression_ratio_threshold
        if how.logprob_threshold is not None and one.score < how.logprob_threshold:
            quiet = how.no_speech_threshold is not None and (one.no_speech or 0.0) > how.no_speech_threshold
            if quiet:
                return one._replace(silent=True), True
            again = True
        return one, not again

    def _said(self, segments: list[Segment]) -> tuple[int, ...]:
        """What stands before a transcript of what was said before."""
        first = self._tokens.no_timestamps
        said: list[int] = []
        for segment in segments:
            tokens = segment.tokens
            twice = first is not None and len(tokens) > 2 and tokens[-2] > first
            said += tokens[:-1] if twice else tokens
        before = self._tokens.previous
        if before is None and len(self._config.suppress_tokens) > 1:
            before = self._config.suppress_tokens[-2]
        return (*(() if before is None else (before,)), *said[-self._kept :])

    def _named(self, prompt: tuple[int, ...]) -> str | None:
        codes = {token: code for code, token in self._tokens.languages}
        return next((codes[token] for token in prompt if token in codes), None)


@dataclass(frozen=True)
class _Try:
    """A transcript of a stretch."""

    tokens: tuple[int, ...]
    ended: bool
    score: float
    no_speech: float | None
    temperature: float
    silent: bool = False

    def _replace(self, *, silent: bool) -> _Try:
        return dataclasses.replace(self, silent=silent)


def compression_ratio(tokens: Sequence[int], vocabulary: int) -> float:
    """By what factor zlib makes tokens smaller, written with as many bytes as a token of the vocabulary needs."""
    size = int(math.log2(vocabulary) / 8) + 1
    plain = b"".join(token.to_bytes(size, "little") for token in tokens)
    return len(plain) / len(zlib.compress(plain))


def _segments(made: _Try, seek: int, count: int, tokens: SpeechTokens, timestamps: bool) -> tuple[list[Segment], int]:
    """(the segments of a stretch's transcript, frames from its beginning to that of the next).

    Args:
      seek: the frame with which the stretch begins. count: frames that it has.
    """
    offset, ids = seek * STEP / FRAMES_OF_STEP, made.tokens
    first = None if tokens.no_timestamps is None else tokens.no_timestamps + 1
    times = [first is not None and one >= first for one in ids]

    def segment(part: tuple[int, ...], start: float, end: float) -> Segment:
        return Segment(offset + start, offset + end, part, made.score, made.no_speech, made.temperature)

    pairs = [place + 1 for place in range(len(ids) - 1) if times[place] and times[place + 1]]
    if first is None or not pairs:
        last = [place for place, is_time in enumerate(times) if is_time]
        end = int(count * STEP / FRAMES_OF_STEP / STEP)
        if first is not None and last and ids[last[-1]] != first:
            end = ids[last[-1]] - first
        return [segment(ids, 0.0, end * STEP)], count
    single = times[-2:] == [False, True]
    if single:
        pairs.append(len(ids))
    else:  # the last time too: it tells that nothing stands behind it
        pairs[-1] += 1
    found, begin = [], 0
    for place in pairs:
        part = ids[begin:place]
        last_of = part[-2] if place == pairs[-1] and not single else part[-1]
        found.append(segment(part, (part[0] - first) * STEP, (last_of - first) * STEP))
        begin = place
    step = count if single else (ids[begin - 2] - first) * FRAMES_OF_STEP
    return found, step if step > 0 else count
