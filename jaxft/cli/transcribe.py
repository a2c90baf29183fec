"""``jaxft transcribe``: recordings in, what they say out."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from jaxft.config.speech import SpeechTokens
    from jaxft.data.processors.speech import SpeechProcessor
    from jaxft.files import JsonObject
    from jaxft.inference.generation.speech import Listener, Transcript
    from jaxft.inference.predict import Served


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint or hub id of a model of speech")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT|key=value",
        help="files of sound, folders of them, or one table that names them (data.audio is the column); and overrides",
    )
    parser.add_argument("--language", help="what is spoken, a code or an English name (default: what is heard)")
    parser.add_argument("--translate", action="store_true", help="into English")
    parser.add_argument(
        "--no-timestamps", action="store_true", help="texts without times, of up to what is heard at once"
    )
    parser.add_argument(
        "--chunks",
        type=float,
        metavar="SECONDS",
        help="hear long recordings in overlapping chunks, without times: faster",
    )
    parser.add_argument(
        "--fallback",
        action="store_true",
        help="write again, drawn at rising temperatures, what repeats itself or is improbable, as Whisper's authors do",
    )
    parser.add_argument("--num-beams", type=int, help="transcripts that are gone on with at once")
    parser.add_argument("--max-new-tokens", type=int, help="tokens of a stretch at most")
    parser.add_argument("--batch-size", type=int, default=8, help="recordings heard at once (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of draws (default: 0)")
    parser.add_argument("--out", help="write JSON Lines here instead of to standard output")


def run(options: argparse.Namespace) -> int:
    """Writes a JSON object for each recording: its text, its language, and its segments with their times."""
    from jaxft.data.sources.media import is_media
    from jaxft.errors import UserError
    from jaxft.files import file_written_whole
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    inputs = [item for item in options.inputs if "=" not in item or Path(item).exists()]
    overrides = [item for item in options.inputs if item not in inputs]
    if not inputs or (len(inputs) > 1 and not all(is_media(item) or Path(item).is_dir() for item in inputs)):
        raise UserError("give files of sound, folders of them, or one table that names them")
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    set_up_jax(compile_cache.FOLDER)
    from jaxft.inference.predict import open_model

    served = open_model(options.model, overrides, _say)
    if served.model.facts.processor != "audio":
        raise UserError(
            f"{options.model} reads {served.model.facts.processor}s; jaxft predict and jaxft generate answer for it"
        )
    processor, listener = _opened(served, options)
    with ExitStack() as opened:
        file: IO[str] = opened.enter_context(file_written_whole(Path(options.out))) if options.out else sys.stdout
        _write(_recordings(inputs, served, processor), processor, listener, options, file)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _opened(served: Served, options: argparse.Namespace) -> tuple[SpeechProcessor, Listener]:
    from jaxft.config.speech import SpeechGeneration
    from jaxft.data.processors.speech import SpeechProcessor
    from jaxft.inference.generation.speech import FALLBACK, Listener, Listening

    processor = served.processor
    assert isinstance(processor, SpeechProcessor)
    tokens, found = _settings(served)
    times = tokens.no_timestamps is not None and not options.no_timestamps and options.chunks is None
    usual: JsonObject = {}
    if options.fallback:  # section 4.5 of the paper
        usual = {
            "temperatures": FALLBACK,
            "compression_ratio_threshold": 2.4,
            "logprob_threshold": -1.0,
            "no_speech_threshold": 0.6,
        }
    task = "translate" if options.translate else "transcribe" if options.language is not None else None
    how = Listening(options.language, task, times, seed=options.seed, **usual)
    asked = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
    config = SpeechGeneration(**{**found, **{name: value for name, value in asked.items() if value is not None}})
    return processor, Listener(served.model, served.params, processor.log_mel, tokens, config, how)


def _settings(served: Served) -> tuple[SpeechTokens, JsonObject]:
    """What transcripts begin with, and how they are written: as the model's folder says; of a checkpoint, as its run would export it."""
    from jaxft.inference.generation.speech import stored_speech
    from jaxft.inference.generation.stored import FILE
    from jaxft.training.setup import files_of_run

    start = served.model.facts.start or 0
    if (served.folder / FILE).is_file():
        return stored_speech(served.folder, start, _say)
    with TemporaryDirectory() as folder:
        said = files_of_run(served.config, served.model, served.processor).get(FILE)
        if said is not None:
            (Path(folder) / FILE).write_text(said, encoding="utf-8")
        return stored_speech(served.folder if said is None else Path(folder), start, _say)


def _recordings(inputs: list[str], served: Served, processor: SpeechProcessor) -> Iterator[tuple[str, np.ndarray]]:
    """The name and the samples of each."""
    from jaxft.data.row_rules import is_broken
    from jaxft.data.sources.read import iter_rows
    from jaxft.data.sources.rows import Binary

    data, broken, changed = served.config.data, 0, Counter[str]()
    for row in iter_rows(inputs[0] if len(inputs) == 1 else tuple(inputs), (Binary(data.audio),)):
        (value,) = row.values
        assert isinstance(value, bytes | str)
        if data.broken_files == "skip" and is_broken(value, "sound", row.where):
            broken += 1
            continue
        samples, how = processor.samples(value, row.where)
        changed.update([] if how is None else [how])
        yield value if isinstance(value, str) else row.where, samples
    for how, count in changed.items():
        _say(f"{count} recordings: {how}")
    if broken:
        _say(f"{broken} files cannot be read and are left out")


def _write(
    recordings: Iterator[tuple[str, np.ndarray]],
    processor: SpeechProcessor,
    listener: Listener,
    options: argparse.Namespace,
    file: IO[str],
) -> None:
    from jaxft.files import is_unicode
    from jaxft.inference.chunks import chunks

    ascii_only = not is_unicode(file)
    for some in chunks(recordings, options.batch_size):
        if options.chunks is None:
            made = listener.transcribe([samples for _, samples in some])
        else:
            made = [listener.in_chunks(samples, seconds=options.chunks) for _, samples in some]
        for (name, _), transcript in zip(some, made, strict=True):
            print(json.dumps(_record(name, transcript, processor), ensure_ascii=ascii_only), file=file)
        file.flush()


def _record(name: str, made: Transcript, processor: SpeechProcessor) -> dict[str, object]:
    tokens = processor.tokens
    words = processor.tokenizer.vocab_size if tokens is None else tokens.end

    def text(ids: tuple[int, ...] | list[int]) -> str:
        # Times stand behind the token that ends texts, where there are any.
        timed = tokens is not None and tokens.no_timestamps is not None
        return str(processor.tokenizer.decode([one for one in ids if not timed or one < words]))

    segments = [
        {
            "start": round(one.start, 2),
            "end": round(one.end, 2),
            "text": text(one.tokens).strip(),
            "score": round(one.score, 4),
            **({} if one.no_speech is None else {"no_speech": round(one.no_speech, 4)}),
        }
        for one in made.segments
    ]
    language = {} if made.language is None else {"language": made.language}
    return {"audio": name, "text": text(made.tokens).strip(), **language, "segments": segments}
