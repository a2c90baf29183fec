"""How the next token is chosen, under the names of the reference's ``generation_config.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxft.errors import UserError


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
    decoder_start_token_id: int | None = None
    """What the texts of an encoder-decoder begin with; None: as its config.json says."""
    forced_bos_token_id: int | None = None
    """The first token behind that, a language for instance; None: any. Texts of encoder-decoders alone."""
    forced_eos_token_id: int | None = None
    """The last of ``max_new_tokens``, where a text comes so far; None: any."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never chosen."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that a text does not begin with, behind one that is forced."""

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
        for name in TOKENS:
            said = getattr(self, name)
            for one in said if isinstance(said, tuple) else () if said is None else (said,):
                if type(one) is not int or one < 0:
                    raise UserError(f"{name}={said!r}: must be a token's id, 0 or above")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}")


_MOST = 10**7
TOKENS = (
    *("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens"),
)
"""Fields that are ids of tokens."""
