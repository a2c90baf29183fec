"""Scaled dot-product attention: one entry, :func:`attend`, that takes mask *data*, never a mask array.

Dims: B batch, S query length, T key length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import jax
from jaxtyping import Float, PRNGKeyArray

from jaxft.attention.backends.scores import Call
from jaxft.attention.choice import NAMES, Choice, choices, choose, described, note
from jaxft.attention.dropout import make_dropout
from jaxft.attention.mask import MaskSpec
from jaxft.attention.request import Request, request_of
from jaxft.layers import Compute, Rate

__all__ = ["NAMES", "Choice", "MaskSpec", "Request", "attend", "choices", "choose", "described", "tokens_last"]

Array = jax.Array


def attend(
    q: Float[Array, "B N S H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    mask: MaskSpec,
    compute: Compute,
    rate: Rate = 0.0,
    key: PRNGKeyArray | None = None,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    bias: Float[Array, "#B #N S T"] | None = None,
) -> Float[Array, "B N S H"]:
    """Attention of queries to keys: softmax(cap(scale q k^T) + bias) v, with float32 softmax (Vaswani et al. 2017).

    ``compute.attention`` names the backend, or is ``auto``. Our own ones but ``reference`` keep no more for the backward
    pass than inputs, output and two numbers per query (``xla`` with threefry bits: those of dropout too).

    Args:
      k, v: each of the K heads serves N / K neighbouring ones (Ainslie et al. 2023). S and T may differ, where queries are of other
        tokens than keys, or of some of them (``mask.first`` says of which).
      mask: who may see whom; queries that may see nothing give zeros.
      rate, key: dropout of attention probabilities; no key, no dropout. The bits depend on T, the key, and the numbers of row,
        head, query and key: not on ``mask``, the backend, its blocks, or the mesh.
      scale: of q k^T; None: 1 / sqrt(H).
      soft_cap: logits l become soft_cap tanh(l / soft_cap).
      bias: added to the logits.

    Raises:
      ValueError: shapes that do not fit.
      UserError: the backend asked for cannot honour the call; the message names those that can.
    """
    (b, n, s, h), t = q.shape, k.shape[2]
    if k.shape != v.shape or k.shape[::3] != (b, h) or n % k.shape[1]:
        shapes = f"queries [B, N, S, H] {q.shape}, keys {k.shape} and values {v.shape} [B, K, T, H]"
        raise ValueError(f"{shapes}: B and H must be equal, K divide N")
    if scale is not None and scale <= 0:
        raise ValueError(f"scale={scale}: must be above 0")
    if bias is not None and not (bias.shape[0] in (1, b) and bias.shape[1] in (1, n) and bias.shape[2:] == (s, t)):
        raise ValueError(f"bias {bias.shape}: must be [{b} or 1, {n} or 1, {s}, {t}]")
    drop = None
    if key is not None and rate > 0.0:
        drop = make_dropout(key, rate, b, n, s, t, compute.dropout_bits)
    mask = mask.fitted(b, s, t).merged()
    call = Call(compute, h**-0.5 if scale is None else scale, soft_cap)
    request = request_of(call, q, k, mask, bias, None if drop is None else drop.bits)
    choice = choose(request, compute.attention)
    note(choice)
    return choice.backend.run(call, q, k, v, mask, bias, drop)


def tokens_last(
    q: tuple[int, int, int, int],
    key_heads: int,
    mask: MaskSpec,
    compute: Compute,
    dropout: bool = False,
    soft_cap: float | None = None,
) -> bool:
    """Whether :func:`attend` of queries of shape ``q`` [B, N, S, H] is best given heads that were made as [N, H, B S].

    Its arguments stay [B, N, S, H]: those that :func:`jaxft.layers.rows_of` makes of it, which costs nothing then.
    """
    b, _, s, h = q
    of_queries, of_keys = (jax.ShapeDtypeStruct(shape, compute.activation_dtype) for shape in (q, (b, key_heads, s, h)))
    call = Call(compute, h**-0.5, soft_cap)
    request = request_of(call, of_queries, of_keys, mask.merged(), None, compute.dropout_bits if dropout else None)
    return choose(request, compute.attention).backend.tokens_last(request)
