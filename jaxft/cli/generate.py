"""``jaxft generate``: prompts in, the texts that follow them out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jaxft.files import JsonObject
    from jaxft.inference.generation import Writer
    from jaxft.inference.generation.texts import Prompt


def _ending(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text, text)


_SETTINGS = {
    "max_new_tokens": (int, "tokens that are made at most (default: as generation_config.json says, or 128)"),
    "min_new_tokens": (int, "tokens before which no text ends"),
    "temperature": (float, "draw tokens, from probabilities flattened by this; 0: always the most probable one"),
    "top_k": (int, "draw from the TOP_K most probable tokens"),
    "top_p": (float, "draw from the most probable tokens that together have this probability"),
    "min_p": (float, "draw from tokens of at least this share of the largest probability"),
    "repetition_penalty": (float, "above 1: tokens that are there already become less likely"),
    "no_repeat_ngram_size": (int, "no run of so many tokens comes twice"),
    "num_beams": (int, "texts that are gone on with at once; the most probable one is the answer"),
    "length_penalty": (float, "with beams: above 0, longer texts become better (1)"),
    "early_stopping": (
        _ending,
        "with beams: true ends at as many texts as beams, never once none can become better (false)",
    ),
}
_DRAFT_TOKENS = 5
_DRAWS = ("temperature", "top_k", "top_p", "min_p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "model", help="exported folder, run folder, checkpoint or hub id of a decoder, or of an encoder-decoder"
    )
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT|key=value",
        help="a .csv .tsv .jsonl .parquet .txt file (data.text names the column), or - for standard input (a prompt per line); "
        "and overrides such as mesh.tensor=2",
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt; one alone is answered as it is written"
    )
    parser.add_argument("--out", help="write JSON Lines here instead of to standard output")
    parser.add_argument("--batch-size", type=int, default=8, help="prompts computed at once (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of draws (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], help="a string that ends a text; may be given several times"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are what a user says, or lists of messages, written by the model's chat template",
    )
    for side, text in (("source", "prompts are in"), ("target", "to write, of a model that knows several")):
        parser.add_argument(
            f"--{side}-language", metavar="LANG", help=f"the language {text}, as its tokenizer calls it: de_DE"
        )
    parser.add_argument("--draft", metavar="MODEL", help="a smaller model of the same tokenizer that proposes tokens")
    parser.add_argument(
        "--draft-tokens", type=int, metavar="K", help=f"tokens that it proposes at once (default: {_DRAFT_TOKENS})"
    )
    parser.add_argument("--system", help="with --chat: what conversations begin with")
    for name, (kind, text) in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text)


def run(options: argparse.Namespace) -> int:
    """Writes what follows one prompt as it is made, or a JSON object for each of several."""
    from jaxft.errors import UserError
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    inputs = [item for item in options.inputs if "=" not in item or Path(item).exists()]
    overrides = [item for item in options.inputs if item not in inputs]
    if bool(inputs) == bool(options.prompt) or len(inputs) > 1:
        raise UserError("give one INPUT (a file, or - for standard input) or --prompt")
    if options.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    if options.system is not None and not options.chat:
        raise UserError("--system is for conversations; give --chat too")
    if options.draft_tokens is not None and options.draft is None:
        raise UserError("--draft-tokens is of a draft; give --draft too")
    set_up_jax(compile_cache.FOLDER)
    writer = _writer(options, overrides)
    if len(options.prompt) == 1 and not options.out:
        _stream(writer, options.prompt[0])
    else:
        _answer(writer, options, inputs, overrides)
    if (said := writer.draft_text()) is not None:
        print(said, file=sys.stderr)
    return 0


def _answer(writer: Writer, options: argparse.Namespace, inputs: list[str], overrides: list[str]) -> None:
    prompts = list(_prompts(inputs[0], overrides, options.chat)) if inputs else options.prompt
    if options.out:
        from jaxft.files import file_written_whole

        with file_written_whole(Path(options.out)) as file:
            _write(writer, prompts, options.batch_size, file)
    else:
        _write(writer, prompts, options.batch_size, sys.stdout)


def _writer(options: argparse.Namespace, overrides: list[str]) -> Writer:
    from jaxft.data.processors.contract import Languages
    from jaxft.inference.generation import GenerationConfig, Writer, stored_generation
    from jaxft.inference.predict import open_model

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    served = open_model(options.model, overrides, note)
    found = stored_generation(served.folder, note, two_sides=served.model.facts.start is not None)
    asked: JsonObject = {name: getattr(options, name) for name in _SETTINGS if getattr(options, name) is not None}
    if asked.get("temperature") == 0:
        del asked["temperature"]
        asked["do_sample"] = False
    elif any(name in asked for name in _DRAWS):
        asked["do_sample"] = True
    config = GenerationConfig(**{**found, **asked})
    draft = None if options.draft is None else open_model(options.draft, overrides, note)
    count = _DRAFT_TOKENS if options.draft_tokens is None else options.draft_tokens
    return Writer(
        served,
        config,
        stop=options.stop,
        seed=options.seed,
        chat=options.chat,
        system=options.system,
        draft=draft,
        draft_tokens=count,
        languages=Languages(options.source_language, options.target_language),
    )


def _prompts(reference: str, overrides: list[str], chat: bool) -> Iterator[Prompt]:
    from jaxft.config import load_config
    from jaxft.data.processors.chat import check_messages
    from jaxft.data.sources.read import column_names, form_of, iter_rows
    from jaxft.data.sources.rows import Listed
    from jaxft.errors import UserError

    data = load_config(None, overrides).data
    form = form_of(data, lambda text: print(text, file=sys.stderr))
    named = bool(column_names(reference, data.text, form))
    column = data.text if named else "text"
    for row in iter_rows(reference, (Listed(column) if chat else column,), form):
        (prompt,) = row.values
        if chat and isinstance(prompt, list):
            yield check_messages(prompt, row.where)
        elif isinstance(prompt, str):
            yield prompt
        else:
            raise UserError(f"{row.where}: a prompt must be a text")


def _stream(writer: Writer, prompt: str) -> None:
    for piece in writer.stream(prompt):
        if isinstance(piece, str):
            print(piece, end="", flush=True)
        elif piece.finish == "length":
            print(f"\n(ended after {piece.tokens} tokens; --max-new-tokens)", file=sys.stderr)
    print()


def _write(writer: Writer, prompts: list[Prompt], batch_size: int, file: IO[str]) -> None:
    from jaxft.files import is_unicode

    ascii_only = not is_unicode(file)
    for prompt, made in zip(prompts, writer.write(prompts, batch_size), strict=True):
        record = {"prompt": prompt, "text": made.text, "tokens": made.tokens, "finish": made.finish}
        print(json.dumps(record, ensure_ascii=ascii_only), file=file)
