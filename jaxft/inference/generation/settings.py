"""How the next token is chosen, under the names of the reference's ``generation_config.json``."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.hub.source import Note, read_json

FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationConfig:
    """How a text goes on. Static and hashable: part of the key of compiled programs."""

    max_new_tokens: int = 128
    """Tokens that are made at most."""
    min_new_tokens: int = 0
    """Before so many are made, none of ``eos_token_id`` is chosen."""
    do_sample: bool = False
    """Whether tokens are drawn by their probability; if not, the most probable one is taken."""
    temperature: float = 1.0
    """What logits are divided by before tokens are drawn."""
    top_k: int = 0
    """Only the k most probable tokens are drawn from; 0: all."""
    top_p: float = 1.0
    """Only the most probable tokens that together have this probability are drawn from (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Only tokens of at least this share of the largest probability are drawn from (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """What the logit of a token that is there already is divided by, if it is positive, or multiplied with (Keskar et al. 2019)."""
    no_repeat_ngram_size: int = 0
    """No run of so many tokens comes twice; 0: any may."""
    num_beams: int = 1
    """Texts that are gone on with at once, of which the most probable is the answer; 1: none but the one."""
    length_penalty: float = 1.0
    """With beams: the power of its length that a text's log-probability is divided by; above 0, longer ones become better."""
    early_stopping: bool | Literal["never"] = False
    """With beams: ``True`` ends once as many texts have ended as there are beams; ``False`` once none is likely to become better;
    ``never`` once none can."""
    eos_token_id: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self) -> None:
        for name, low in (
            ("max_new_tokens", 1),
            ("min_new_tokens", 0),
            ("top_k", 0),
            ("no_repeat_ngram_size", 0),
            ("num_beams", 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= _MOST:
                raise UserError(f"{name}={value!r}: must be a whole number from {low} to {_MOST:,}")
        for name, high in (("temperature", math.inf), ("repetition_penalty", math.inf), ("top_p", 1.0)):
            value = getattr(self, name)
            if not 0 < value <= high or math.isinf(value):
                raise UserError(
                    f"{name}={value!r}: must be above 0" + (f" and at most {high:g}" if high < math.inf else "")
                )
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p!r}: must be from 0 to 1")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty={self.length_penalty!r}: must be a finite number")
        if self.early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping={self.early_stopping!r}: must be true, false or 'never'")
        if self.num_beams > 1 and self.do_sample:
            raise UserError(
                f"num_beams={self.num_beams}: beams are compared by their probability, and not drawn; leave out one of the two"
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}")


_MOST = 10**7
_NAMES = tuple(field.name for field in dataclasses.fields(GenerationConfig) if field.name != "eos_token_id")
_OTHERS = {
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "force_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "dola_layers": None,
    "watermarking_config": None,
}
"""Settings of the reference that change texts and are not built, and the value with which they change nothing."""


def stored_generation(folder: Path, note: Note) -> JsonObject:
    """What a model's folder says of :class:`GenerationConfig`'s fields: its generation_config.json, or else what config.json says of the
    tokens that end a text.

    Args:
      note: called with a line on settings that are there and are not followed.

    Raises:
      UserError: the file is malformed.
    """
    path = folder / FILE
    if not path.is_file():
        config = folder / "config.json"
        return _ends(read_json(config), config) if config.is_file() else {}
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
    ignored = [name for name, usual in _OTHERS.items() if tree.get(name, usual) not in (usual, None)]
    if ignored:
        note(f"{path}: not followed: {', '.join(f'{name}={tree[name]!r}' for name in ignored)}")
    return found | _ends(tree, path)


def _ends(tree: dict[str, object], path: Path) -> JsonObject:
    ends = tree.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(one) is int and one >= 0 for one in listed):
        raise UserError(f"{path}: eos_token_id={ends!r}: must be a token's id, or a list of them")
    return {"eos_token_id": tuple(listed)} if listed else {}
