"""Proof of parity: the same inputs through jaxft and through `transformers` on torch, compared number by number.

Needs torch, on demand only: nothing else in the package imports it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.models.contract import Model, Output
from jaxft.trees import Params

TOLERANCE = 2e-5
"""Largest difference, relative to the largest value compared (and absolute below 1)."""


@dataclass(frozen=True)
class Difference:
    """One compared array."""

    name: str
    largest: float
    """max |ours - theirs|, padding positions excluded."""
    scale: float
    """max |theirs|."""

    @property
    def passed(self) -> bool:
        """Whether the difference is within :data:`TOLERANCE`; NaN is not."""
        return self.largest <= TOLERANCE * max(1.0, self.scale)


@dataclass(frozen=True)
class Reference:
    """A model as `transformers` loads it, in float32."""

    model: Any
    made_up: tuple[str, ...]
    """Names of parameters that the folder does not have and that were initialised at random."""


def load_reference(folder: Path, architecture: str, *, rounded_to: str | None = None, **config: object) -> Reference:
    """Loads a folder in Hugging Face layout with `transformers`.

    Args:
      folder: config.json and weights, of a format that the reference reads.
      architecture: the reference's class.
      rounded_to: type that each parameter is rounded to after loading; None: float32 as loaded.
      config: changes to config.json, for instance ``num_labels=3``.

    Raises:
      UserError: torch or transformers is not installed, or the reference cannot load the folder.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--check compares with transformers on torch, which is not installed ({error.name}); pip install torch"
        ) from error

    transformers.utils.logging.disable_progress_bar()
    kind = getattr(transformers, architecture)
    try:
        # A class of the library's own, its own attention, files of this folder: nothing that the folder names is run.
        attention = "sdpa" if getattr(kind, "_supports_sdpa", False) else "eager"  # of models with biases of their own
        safe = {"trust_remote_code": False, "local_files_only": True, "attn_implementation": attention}
        how = {"dtype": torch.float32, "output_loading_info": True, **safe, **config}
        model, report = kind.from_pretrained(str(folder), **how)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: transformers cannot load it: {reason}") from error
    if rounded_to is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, rounded_to)))
    return Reference(model.eval(), tuple(sorted(report["missing_keys"])))


_INPUTS = {
    "tokens": "input_ids",
    "mask": "attention_mask",
    "types": "token_type_ids",
    "decoder_tokens": "decoder_input_ids",
    "decoder_mask": "decoder_attention_mask",
    "pixels": "pixel_values",
    "frames": "input_features",
}


def _as_theirs(name: str, value: np.ndarray) -> np.ndarray:
    """An input as the reference takes it: ids in 64 bits, channels and bins of frequency before all places."""
    if name in ("pixels", "frames"):
        return np.ascontiguousarray(np.moveaxis(value, -1, 1))
    return value.astype(np.int64)


def seen_in(batch: dict[str, np.ndarray]) -> np.ndarray | None:
    """[B, S] which places of the last layer are no padding; None: none is."""
    return batch.get("decoder_mask", batch.get("mask"))


def outputs_of_reference(reference: Reference, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What :func:`outputs` gives, computed by `transformers`; without what depends on made-up parameters.

    Raises:
      UserError: parameters of the encoder itself were made up.
    """
    import torch

    inputs = {_INPUTS[name]: torch.tensor(_as_theirs(name, value)) for name, value in batch.items()}
    if type(reference.model).__name__.endswith(
        "ForMultipleChoice"
    ):  # [rows, choices, length]: each row a question of its own
        inputs = {name: value[:, None] for name, value in inputs.items()}
    with torch.no_grad():
        out = reference.model(**inputs, output_hidden_states=True)
    states = out.decoder_hidden_states if "decoder_hidden_states" in out else out.hidden_states
    found = {"hidden states": states[-1].numpy()}
    if getattr(out, "logits", None) is not None:
        # What has one number for each token has no axis of classes there.
        one_each = "tokens" in batch and out.logits.shape == batch["tokens"].shape
        found["logits"] = (out.logits[..., None] if one_each else out.logits).numpy()
    elif getattr(out, "start_logits", None) is not None:
        found["logits"] = torch.stack([out.start_logits, out.end_logits], -1).numpy()
    elif getattr(out, "sop_logits", None) is not None:
        found["logits"] = out.sop_logits.numpy()
    elif getattr(out, "pooler_output", None) is not None:
        found["pooled"] = out.pooler_output.numpy()
    # Two heads stand beside each other there.
    apart = ("predictions.",) if getattr(out, "sop_logits", None) is not None else ()
    made_up = [name for name in reference.made_up if not name.startswith(apart)]
    if not made_up:
        return found
    body = f"{reference.model.base_model_prefix}." if "logits" in found else ""
    inside = [name for name in made_up if name.startswith(body) and "pooler." not in name]
    if inside:
        raise UserError(
            f"transformers finds no {inside[0]} in the weights and makes it up: there is nothing to compare with"
        )
    return {"hidden states": found["hidden states"]}


def outputs(model: Model, params: Params, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hidden states [B, S, D], and logits or the pooled vector [B, D] if the model has them, computed by us in float32."""
    ours = _apply(model.clone(compute=Compute()), params, batch)
    # What the reference gives of images is not normalised.
    hidden = ours.hidden if ours.hidden_states is None else ours.hidden_states[-1]
    named = {
        "hidden states": hidden,
        "logits": ours.logits,
        "pooled": None if ours.logits is not None else ours.pooled,
    }
    return {name: np.asarray(value) for name, value in named.items() if value is not None}


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Model, params: Params, batch: dict[str, np.ndarray]) -> Output:
    more = {} if "tokens" in model.facts.inputs else {"hidden_states": True}
    return model.apply({"params": params}, **batch, **more)


def compare(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], mask: np.ndarray | None, by: str
) -> list[Difference]:
    """Differences of the arrays that both have, padding left out (:func:`seen_in`); ``by`` says who computed ours."""
    return [difference(f"{name} ({by})", ours[name], theirs[name], mask) for name in theirs if name in ours]


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray | None) -> Difference:
    """Compares two arrays; [B, S, ...] ones only where ``mask`` [B, S] is set. NaN and infinity equal themselves."""
    if ours.ndim == 3 and mask is not None:
        ours, theirs = ours[mask.astype(bool)], theirs[mask.astype(bool)]
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    apart = np.abs(np.where(same, 0.0, ours) - np.where(same, 0.0, theirs))
    return Difference(
        name, float(apart.max()), float(np.abs(theirs, where=np.isfinite(theirs), out=np.zeros_like(theirs)).max())
    )


def report_text(differences: list[Difference]) -> str:
    """The comparison as a table."""
    width = max(16, *(len(d.name) + 2 for d in differences))
    lines = [f"{'compared':{width}}{'largest difference':>20}{'largest value':>16}  within {TOLERANCE:g}"]
    lines += [f"{d.name:{width}}{d.largest:20.2e}{d.scale:16.3g}  {'yes' if d.passed else 'NO'}" for d in differences]
    return "\n".join(lines)
