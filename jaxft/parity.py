"""Proof of parity: the same inputs through jaxft and through `transformers` on torch, compared number by number.

Needs torch, on demand only: nothing else in the package imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError
from jaxft.layers import Compute

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
        """Whether the difference is within :data:`TOLERANCE`."""
        return self.largest <= TOLERANCE * max(1.0, self.scale)


def compare(folder: Path, model: Any, params: Any, rows: int = 4) -> list[Difference]:
    """Hidden states, pooled vector and logits of random rows with ragged padding, ours against the reference's.

    Args:
      folder: in Hugging Face layout, for the reference to load.
      model, params: ours.

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
    batch = random_batch(model.config, rows)
    exact = model.clone(compute=Compute())
    ours = jax.jit(exact.apply)({"params": params}, **batch)
    architecture = getattr(transformers, models_architecture(model))
    try:
        theirs_model = architecture.from_pretrained(str(folder), dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder}: transformers cannot load it: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    inputs = {
        "input_ids": torch.tensor(batch["tokens"].astype(np.int64)),
        "attention_mask": torch.tensor(batch["mask"].astype(np.int64)),
    }
    if "types" in batch:
        inputs["token_type_ids"] = torch.tensor(batch["types"].astype(np.int64))
    with torch.no_grad():
        theirs = theirs_model(**inputs, output_hidden_states=True)
    pairs = [("hidden states", ours.hidden, theirs.hidden_states[-1].numpy())]
    if ours.logits is not None:
        pairs.append(("logits", ours.logits, theirs.logits.numpy()))
    elif ours.pooled is not None:
        pairs.append(("pooled", ours.pooled, theirs.pooler_output.numpy()))
    return [difference(name, np.asarray(a), b, batch["mask"]) for name, a, b in pairs]


def models_architecture(model: Any) -> str:
    """The reference's class for a model."""
    import importlib

    return importlib.import_module(type(model).__module__).HEADS[model.head]


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray) -> Difference:
    """Compares two arrays; [B, S, ...] ones only where ``mask`` [B, S] is set."""
    if ours.ndim == 3:
        ours, theirs = ours[mask.astype(bool)], theirs[mask.astype(bool)]
    return Difference(name, float(np.abs(ours - theirs).max()), float(np.abs(theirs).max()))


def random_batch(config: Any, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens, types if the family has them, and ragged padding: the first row is full, the last has one token."""
    rng = np.random.default_rng(seed)
    length = min(48, config.max_position_embeddings)
    lengths = np.linspace(length, 1, rows).astype(int)
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    low = min(5, config.vocab_size - 1)
    batch = {"tokens": rng.integers(low, config.vocab_size, (rows, length)).astype(np.int32) * mask, "mask": mask}
    kinds = getattr(config, "type_vocab_size", None)
    if kinds is not None:
        batch["types"] = (rng.integers(0, kinds, (rows, length)) * mask).astype(np.int32)
    return batch


def report_text(differences: list[Difference]) -> str:
    """The comparison as a table."""
    lines = [f"{'compared':16}{'largest difference':>20}{'largest value':>16}  within {TOLERANCE:g}"]
    lines += [f"{d.name:16}{d.largest:20.2e}{d.scale:16.3g}  {'yes' if d.passed else 'NO'}" for d in differences]
    return "\n".join(lines)
