"""The few layers all models are built from: pure functions, and thin Linen modules that declare their parameters."""

from jaxft.layers.bits import hash_words, keep_at
from jaxft.layers.compute import Compute
from jaxft.layers.entry import checked_call
from jaxft.layers.functions import ACTIVATIONS, dropout, gelu, keep_mask, layer_norm, rms_norm, subkey
from jaxft.layers.heads import FromHeads, Projection, project, project_exactly, project_together, rows_of
from jaxft.layers.matmul import Activation, affine, dot, einsum, recomputed_from
from jaxft.layers.modules import Embed, Initializer, Labelled, LayerNorm, Linear, RMSNorm, declare, labelled, unlabel
from jaxft.layers.promotion import usual_promotion
from jaxft.layers.rates import FixedRate, Rate, RunTimeRate, known_rate, run_time_rate
from jaxft.layers.rotary import Rotary, rotate
from jaxft.layers.stacks import apply_stack, stacked_params
from jaxft.layers.vocabulary import TokenScore, score_tokens, vocabulary_logits

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Compute",
    "Embed",
    "FixedRate",
    "FromHeads",
    "Initializer",
    "Labelled",
    "LayerNorm",
    "Linear",
    "Projection",
    "RMSNorm",
    "Rate",
    "Rotary",
    "RunTimeRate",
    "TokenScore",
    "affine",
    "apply_stack",
    "checked_call",
    "declare",
    "dot",
    "dropout",
    "einsum",
    "gelu",
    "hash_words",
    "keep_at",
    "keep_mask",
    "known_rate",
    "labelled",
    "layer_norm",
    "project",
    "project_exactly",
    "project_together",
    "recomputed_from",
    "rms_norm",
    "rotate",
    "rows_of",
    "run_time_rate",
    "score_tokens",
    "stacked_params",
    "subkey",
    "unlabel",
    "usual_promotion",
    "vocabulary_logits",
]
