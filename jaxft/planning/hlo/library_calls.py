"""Matrix products inside calls of NVIDIA's libraries, from their shapes and XLA's own description of them.

cuBLAS: ``gemm_backend_config``; cuDNN's fused attention: ``cudnn_fmha_backend_config`` (xla/service/gpu/backend_configs.proto).
"""

from __future__ import annotations

import math
import re

from jaxft.errors import UserError
from jaxft.planning.hlo.program import Computation, Op

_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_ATTENTION = "__cudnn$fmha"
# Scores and their product with the values; backwards the scores again, and a gradient each for scores, queries, keys, values
# (Dao et al. 2022, algorithms 1 and 4).
_FORWARDS, _BACKWARDS = 2, 5


def is_library_call(op: Op) -> bool:
    """Whether :func:`library_flops` knows what a custom call computes."""
    return op.target.startswith((*_CUBLAS, _ATTENTION))


def library_flops(op: Op, home: Computation) -> float:
    """2 m n k of each product of one execution; 0 for calls of anything else. Of masked attention, what the mask leaves."""
    if op.target.startswith(_CUBLAS):
        left = home.shapes_of(op)[0]
        return 2.0 * op.shapes[0].size * math.prod(left.dims[i] for i in _listed(op, "lhs_contracting_dimensions"))
    if op.target.startswith(_ATTENTION):
        return _attention_flops(op, home)
    return 0.0


def _attention_flops(op: Op, home: Computation) -> float:
    queries = home.shapes_of(op)[0]
    # The scores, [rows, heads, queries, keys], which exist in no memory.
    found = re.search(r'"intermediate_tensor_shape":\s*\{.*?"dimensions":\s*\[([^\]]*)\]', op.tail)
    if found is None:
        raise UserError(
            f"{op.name}: a call of cuDNN's attention that does not tell the shape of its scores: XLA writes it otherwise now"
        )
    scores = [int(number) for number in re.findall(r"\d+", found[1])]
    head_size = queries.size / math.prod(scores[:-1])
    products = _BACKWARDS if "Backward" in op.target else _FORWARDS
    return products * 2.0 * math.prod(scores) * head_size * _left_by_mask(op, scores[-1])


def _left_by_mask(op: Op, keys: int) -> float:
    """The share of scores that is computed: cuDNN leaves out what is masked as a whole by position, not by padding or bias."""
    causal = re.search(r'"mask_type":\s*"\w*CAUSAL', op.tail)
    window = re.search(r'"sliding_window_length":\s*"?(\d+)', op.tail)
    share = 0.5 if causal else 1.0
    return min(share, int(window[1]) / keys) if window and int(window[1]) else share


def _listed(op: Op, key: str) -> list[int]:
    """The numbers of the list of that name in the backend's description."""
    found = re.search(rf'"{key}":\s*\[([^\]]*)\]', op.tail)
    return [int(number) for number in re.findall(r"\d+", found[1])] if found else []
