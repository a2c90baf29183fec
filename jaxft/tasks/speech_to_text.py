"""Texts from speech: an encoder hears frames of sound, a decoder writes the transcript.

The loss is of the transcript's tokens, the language and the like that it begins with among them, as the reference learns them; evaluation
lets the model write, with the settings that its users will have, and scores the texts.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.speech_to_text import Config
from jaxft.data.batch import WEIGHTS, Example, Field, Fields
from jaxft.data.encode import Column, chunks_of
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.sound import read_sound
from jaxft.data.processors.speech import SpeechProcessor
from jaxft.data.sources.media import file_of
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts, Model
from jaxft.models.decoding.speech import transcripts
from jaxft.tasks import seq2seq
from jaxft.tasks._written import check_scores
from jaxft.tasks.contract import Batch, LongTexts, Note, Targets
from jaxft.trees import Params

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = False
ROW_OPTIONS = ("target", "language", "translate", "timestamps", "max_target_length", "too_long")
PROBLEM: str | None = None
PROCESSOR = "audio"

_SCORES = ("wer",)
_TIMES = re.compile(r"<\|[0-9.]+\|>")
_SOUND, _TARGET = ("batch", "bytes"), ("batch", "target")


@dataclass(frozen=True)
class Task(seq2seq.Task):
    """What is learnt: the tokens of transcripts, each from the sound and those before it. Static and hashable: part of jit cache keys."""

    prefix: tuple[int, ...] = ()
    """What transcripts have behind their start: language, task, whether there are times."""
    stored: str = field(default="{}", compare=False)
    """The generation_config.json of the folder that the model came from."""

    head = "speech_to_text"

    def written(self, model: Model, params: Params, batch: Batch) -> Batch:
        """The ids that are ``written`` [B, N] of each row, -1 behind the end, the number of its ``row``, and ``weights``."""
        if not self.scores:
            return {}
        begun = (self.start, *self.prefix)
        made = transcripts(model, params, self.generation, batch["frames"], batch["weights"] > 0, begun)
        return {"written": made, "row": batch["row"], "weights": batch["weights"]}

    def wanted(self, row: Sequence[object]) -> str:
        """What should be written of a row; times are no words."""
        return _TIMES.sub("", super().wanted(row)).strip()

    def remarks(self, split: Split) -> Iterator[str]:
        """How long transcripts are, and how many sounds are cut."""
        yield from super().remarks(split)
        if split.truncated > 0:
            yield f"{split.name}: {split.truncated} sounds are longer than the model hears at once and are cut"

    def files(self, width: int, max_length: int | None) -> Mapping[str, str]:
        """``generation_config.json``: how transcripts are written, with what the folder said besides."""
        told = json.loads(super().files(width, max_length)["generation_config.json"])
        tree = {**json.loads(self.stored), **told}
        return {"generation_config.json": json.dumps(tree, indent=2) + "\n"}


@dataclass(frozen=True)
class Rendering:
    """Files to frames: see :class:`~jaxft.data.rendering.Rendering`."""

    processor: SpeechProcessor

    @property
    def stored(self) -> Fields:
        """The bytes of a file, and a transcript."""
        return {"audio": Field(_SOUND, "uint8"), **_transcript(self.processor.pad_id)}

    @property
    def fields(self) -> Fields:
        """Frames, and a transcript."""
        return _fields(self.processor.pad_id)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Frames and bins that the model reads."""
        return {"frames": self.processor.log_mel.frames, "bins": self.processor.log_mel.feature_size}

    def rendered(self, example: Example, rng: np.random.Generator | None) -> Example:
        """The frames of a sound; what is random about them (SpecAugment) is the model's."""
        del rng
        frames = self.processor.frames(example["audio"].tobytes(), "a sound of the rows")
        return {**{name: value for name, value in example.items() if name != "audio"}, "frames": frames}


def rendering(config: RunConfig, processor: SpeechProcessor) -> Rendering:
    """How a run's sounds become batches."""
    del config
    return Rendering(processor)


def _transcript(pad_id: int) -> Fields:
    return {
        "target": Field(_TARGET, fill=pad_id),
        "target_mask": Field(_TARGET, value=1),
        "row": Field(("batch",)),
        "weights": WEIGHTS,
    }


def _fields(pad_id: int) -> Fields:
    return {"frames": Field(("batch", "frames", "bins"), "float32"), **_transcript(pad_id)}


def columns(config: RunConfig) -> tuple[Column, ...]:
    """The columns of sounds and of transcripts."""
    options = config.task
    assert isinstance(options, Config)
    return Column(config.data.audio, "sound"), Column(options.target, "text")


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """Nothing; says how long sounds are, and at which rates."""
    del config, stored
    kinds, seconds, longest = Counter[str](), 0.0, 0.0
    for row in rows:
        value = row.values[0]
        assert isinstance(value, bytes | str)
        sound = read_sound(file_of(value, row.where), value if isinstance(value, str) else row.where)
        kinds[f"{sound.rate:,} Hz, {sound.channels} channel{'s' * (sound.channels > 1)}"] += 1
        seconds, longest = seconds + sound.seconds, max(longest, sound.seconds)
    said = "; ".join(f"{count} at {kind}" for kind, count in kinds.most_common())
    note(
        f"sounds: {seconds / 60:.1f} minutes, the longest {longest:.1f} s; {said}; channels are mixed, rates brought to the model's"
    )
    return Targets()


def encode(
    rows: Iterable[Row], processor: SpeechProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each sound as the bytes of its file, and what is to be written of it.

    Raises:
      UserError: a file that is no sound, or longer than the model hears at once.
    """
    options = config.task
    assert isinstance(options, Config)
    del targets
    begun, end = prefix_of(options, processor), processor.tokenizer.special.end
    for first, chunk in chunks_of(rows):
        texts = [str(row.values[1]) for row in chunk]
        wanted = processor.tokenizer.plain(texts)
        for number, (row, (ids, _)) in enumerate(zip(chunk, wanted, strict=True)):
            data, beyond = _checked(row, processor, options)
            example = {
                "audio": np.frombuffer(data, np.uint8),
                "target": np.asarray(
                    [*begun, *ids][: options.max_target_length - 1] + ([] if end is None else [end]), np.int32
                ),
                "row": np.array(first + number, np.int32),
            }
            yield Encoded(example, first + number, beyond)


def _checked(row: Row, processor: SpeechProcessor, options: Config) -> tuple[bytes, int]:
    """(the bytes of a row's file, how many of its samples the model does not hear)."""
    value = row.values[0]
    assert isinstance(value, bytes | str)
    data = file_of(value, row.where)
    name = value if isinstance(value, str) else row.where
    sound, most = read_sound(data, name), processor.log_mel.chunk_length
    if sound.seconds <= most:
        return data, 0
    if options.too_long == "refuse":
        raise UserError(
            f"{name}: {sound.seconds:.1f} s of sound, and the model hears {most} at once; cut it up, or set task.too_long=cut"
        )
    return data, len(sound.samples) - most * sound.rate


def prefix_of(options: Config, processor: SpeechProcessor) -> tuple[int, ...]:
    """What transcripts have behind their start.

    Raises:
      UserError: the model has no such language or task, or knows no times.
    """
    tokens, wanted = processor.tokens, options.language is not None or options.translate or options.timestamps
    if tokens is None or (not wanted and not tokens.languages and tokens.no_timestamps is None):
        if wanted:
            raise UserError(
                f"task.language, task.translate or task.timestamps: {processor.folder} has no generation_config.json that names the tokens "
                "of languages, tasks and times; leave them out"
            )
        return ()
    if tokens.multilingual and tokens.languages and options.language is None:
        raise UserError(
            f"{processor.folder}: the model knows {len(tokens.languages)} languages: set task.language, with which transcripts begin"
        )
    asked = "translate" if options.translate else "transcribe" if options.language is not None else None
    return tokens.prompt(options.language, asked, timestamps=options.timestamps)[1:]


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of frames and transcripts."""
    del config
    return _fields(pad_id)


def sizes(options: Config) -> Mapping[str, int]:
    """Tokens of transcripts, at most."""
    return {"target": options.max_target_length}


def make_task(options: Config, targets: Targets, facts: Facts, processor: SpeechProcessor) -> Task:
    """The task of a run."""
    del targets
    generation, said = options.generation, processor.settings
    if not generation.eos_token_id and processor.tokenizer.special.end is not None:
        generation = dataclasses.replace(generation, eos_token_id=(processor.tokenizer.special.end,))
    never, first = (_stored_ids(said, name) for name in ("suppress_tokens", "begin_suppress_tokens"))
    generation = dataclasses.replace(
        generation,
        suppress_tokens=generation.suppress_tokens or never,
        begin_suppress_tokens=generation.begin_suppress_tokens or first,
    )
    start = facts.start or 0 if generation.decoder_start_token_id is None else generation.decoder_start_token_id
    prefix, limit = prefix_of(options, processor), facts.limit
    longest = max(options.max_target_length, 1 + len(prefix) + generation.max_new_tokens * options.generate)
    if limit is not None and longest > limit:
        raise UserError(
            f"task.max_target_length={options.max_target_length}, task.generation.max_new_tokens={generation.max_new_tokens}: transcripts "
            f"have at most {limit} tokens, {1 + len(prefix)} of them at their beginning; lower them"
        )
    scores: Sequence[str] = _SCORES if options.generate else ()
    check_scores(scores)
    made = Task(start, options.label_smoothing, generation, tuple(scores), processor.tokenizer, prefix)
    return dataclasses.replace(made, stored=json.dumps(dict(said)))


def _stored_ids(said: Mapping[str, object], name: str) -> tuple[int, ...]:
    value = said.get(name)
    return tuple(value) if isinstance(value, list) else ()
