"""How a model's folder says that texts go on: ``generation_config.json``, in and out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxft.config.generation import TOKENS, GenerationConfig
from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.hub.source import Note, read_json

FILE = "generation_config.json"
_NAMES = tuple(field.name for field in dataclasses.fields(GenerationConfig) if field.name not in TOKENS)
_OTHERS = {
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "force_words_ids": None,
    "sequence_bias": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "dola_layers": None,
    "watermarking_config": None,
}
"""Settings of the reference that change texts and are not built, and the value with which they change nothing."""
_OF_TWO_SIDES = ("decoder_start_token_id", "forced_bos_token_id")


def stored_generation(folder: Path, note: Note, *, two_sides: bool = False) -> JsonObject:
    """What a model's folder says of :class:`GenerationConfig`'s fields: its generation_config.json, or else what config.json says of the
    tokens that end a text.

    Args:
      note: called with a line on settings that are there and are not followed.
      two_sides: the model is an encoder-decoder. Lengths of whole texts say how many tokens are new then, and first tokens are forced.

    Raises:
      UserError: the file is malformed.
    """
    path = folder / FILE
    if not path.is_file():
        path = folder / "config.json"
        if not path.is_file():
            return {}
        # Files from before generation_config.json have the settings of encoder-decoders here.
        tree = read_json(path) if two_sides else {"eos_token_id": read_json(path).get("eos_token_id")}
    else:
        tree = read_json(path)
    found: JsonObject = {name: tree[name] for name in _NAMES if tree.get(name) is not None}
    for name, value in found.items():
        usual = getattr(GenerationConfig, name)
        fits = type(value) is type(usual) or (isinstance(usual, float) and type(value) is int)
        fits = fits or (name == "early_stopping" and value == "never")
        if not fits:
            raise UserError(f"{path}: {name}={value!r}: must be of the kind of {usual!r}")
    # Their values in files that say nothing: the reference draws from 50 tokens where it is not told otherwise.
    if found.get("do_sample") and "top_k" not in found:
        found["top_k"] = 50
    others = _OTHERS if two_sides else {**_OTHERS, **dict.fromkeys(_OF_TWO_SIDES)}
    ignored = [name for name, usual in others.items() if tree.get(name, usual) not in (usual, None)]
    bad = tree.get("bad_words_ids")
    single = isinstance(bad, list) and all(isinstance(one, list) and len(one) == 1 for one in bad)
    if bad and not single:
        ignored.append("bad_words_ids")
    if ignored:
        note(f"{path}: not followed: {', '.join(f'{name}={tree[name]!r}' for name in ignored)}")
    if two_sides:
        found = _lengths(tree, path) | found
    return found | _tokens(tree, path, bad if single else [], two_sides)


def _lengths(tree: dict[str, object], path: Path) -> JsonObject:
    """Numbers of new tokens, from lengths of whole texts, whose first token is none of these."""
    found: JsonObject = {}
    for theirs, ours, least in (("max_length", "max_new_tokens", 2), ("min_length", "min_new_tokens", 0)):
        said = tree.get(theirs)
        if said is None:
            continue
        if type(said) is not int or said < least:
            raise UserError(f"{path}: {theirs}={said!r}: must be a whole number from {least} on")
        found[ours] = max(said - 1, 0)
    return found


def _tokens(tree: dict[str, object], path: Path, bad: object, two_sides: bool) -> JsonObject:
    found: JsonObject = {}
    for name in TOKENS:
        if name in _OF_TWO_SIDES and not two_sides:
            continue
        said = tree.get(name)
        listed = said if isinstance(said, list) else [] if said is None else [said]
        if not all(type(one) is int and one >= 0 for one in listed):
            raise UserError(f"{path}: {name}={said!r}: must be a token's id, or a list of them")
        single = getattr(GenerationConfig, name) is None
        if single and len(listed) > 1:
            raise UserError(f"{path}: {name}={said!r}: must be one token's id")
        if listed:
            found[name] = listed[0] if single else tuple(listed)
    if isinstance(bad, list) and bad:
        also = [one[0] for one in bad if type(one[0]) is int and one[0] >= 0]
        already = found.get("suppress_tokens", ())
        found["suppress_tokens"] = (*(already if isinstance(already, tuple) else ()), *also)
    return found
