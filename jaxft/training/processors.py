"""What makes arrays of a run's rows: the tokenizer or the image processor that its configuration names, or what stands for one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from jaxft import tasks
from jaxft.config import RunConfig
from jaxft.data.batch import Field, Fields
from jaxft.data.processors.contract import Languages, Processor, SpecialIds, TextProcessor
from jaxft.data.processors.log_mel import LogMel
from jaxft.data.processors.opened import fresh_processor, open_processor
from jaxft.data.processors.speech import SpeechProcessor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.hub.source import Source, resolve_folder
from jaxft.training.recipe import planned_targets

_ROWS = {"text": "texts", "image": "images", "audio": "sounds"}


def processor_of(config: RunConfig, source: Source | None) -> Processor:
    """What makes arrays of a run's rows: of the folder that is named, or of the one beside its weights; of a model of random weights that
    reads images, the usual one.

    Raises:
      UserError: neither is there, or the model reads something else than the task's rows.
    """
    module = tasks.task(config.task.name)
    facts, asked = planned_targets(config, source)[0] if _is_named(config, source) else None, tasks.modality_of(module)
    if facts is not None and facts.processor != asked:
        whose = config.model.family if source is None else source.folder
        raise UserError(
            f"task.name={config.task.name}: reads {_ROWS[asked]}, and {whose} is a model of {_ROWS[facts.processor]}"
        )
    inputs = {} if facts is None else facts.inputs
    if config.data.tokenizer is not None:
        folder: Path = resolve_folder(config.data.tokenizer)
    elif source is not None:
        folder = source.folder
    else:
        return fresh_processor(Path(), inputs)
    name = config.model.family if source is None else source.family_name
    changed = source is not None and source.stored != source.config
    stored = source.family.facts(source.stored).inputs if source is not None and changed else None
    languages = Languages(*config.task.languages)
    return open_processor(folder, config.data.max_length, inputs, name, stored, languages)


def _is_named(config: RunConfig, source: Source | None) -> bool:
    """Whether the configuration says which model it is of."""
    return source is not None or config.model.family is not None


def stand_in_tokenizer(vocab_size: int = 30522) -> TextProcessor:
    """What stands for a tokenizer where no text is read: it has the tokens that a task may need."""
    special = SpecialIds(pad=0, mask=3, end=2)
    made = SimpleNamespace(
        folder="",
        vocab_size=vocab_size,
        pad_id=0,
        special=special,
        special_ids=(0, 1, 2, 3),
        language=None,
        marks_languages=False,
    )
    made.target, made.around = made, ((), ())
    return cast(TextProcessor, made)


def stand_in_processor(module: tasks.TaskModule, vocab_size: int = 30522, inputs: Fields | None = None) -> Processor:
    """What stands for a processor where nothing is read.

    Args:
      inputs: of the model; None: it is not known.
    """
    if tasks.modality_of(module) == "text":
        return stand_in_tokenizer(vocab_size)
    if tasks.modality_of(module) == "audio":
        return SpeechProcessor(cast(Tokenizer, stand_in_tokenizer(vocab_size)), LogMel())
    return fresh_processor(Path(), _SOME_IMAGE if inputs is None else inputs)


_SOME_IMAGE = {"pixels": Field(("batch", 1, 1, 3))}
