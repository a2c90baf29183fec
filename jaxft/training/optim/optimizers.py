"""From the configuration to one pure gradient transformation.

What happens to a gradient, in this order:

1. rows of frozen layers are set to zero (wholly frozen parameters never get this far and have no state);
2. all gradients together are scaled down to ``clip_norm``;
3. the optimizer's rule turns them into a direction;
4. weight decay adds ``weight_decay`` times the parameter. It is decoupled (Loshchilov and Hutter 2019) for every
   optimizer, SGD included, and is multiplied by the scheduled rate like the rest; ``adam`` has none;
5. layer-wise factors scale the rows of each layer;
6. the scheduled rate, last, so that its count says which rate was applied.

All is computed in float32. Moments are stored in the type of their parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from jaxft.errors import UserError
from jaxft.training.optim.adafactor import scale_by_adafactor
from jaxft.training.optim.freezing import frozen_mask
from jaxft.training.optim.schedules import Schedule
from jaxft.trees import Axes, Leaf, Params, Shapes, Tree, leaves_of, map_paths, paths_of

T = TypeVar("T")

if TYPE_CHECKING:
    from jax.typing import ArrayLike

    from jaxft.config import OptimConfig
    from jaxft.training.optim.tunable import Tunable

_MUON_RMS = 0.2
"""RMS of an orthogonalised update, equal to the one AdamW typically has: rate and weight decay carry over (Liu et al.
2025, "Muon is scalable for LLM training", section 2.2)."""


def make_optimizer(
    config: OptimConfig,
    schedule: Schedule,
    params: Params | Shapes,
    axes: Axes,
    tunable: Tunable[jax.Array] | Tunable[np.ndarray] | None = None,
) -> optax.GradientTransformation:
    """The optimizer for parameters of the given shapes and logical axes.

    Args:
      config: which rule, decay, clipping, layer-wise rates, freezing.
      schedule: from ``make_schedule``.
      params: arrays or ``jax.ShapeDtypeStruct``; only paths and shapes are read.
      axes: tree of the same structure with a tuple of logical axis names (or None) per dimension.
      tunable: what stands for weight decay and clipping instead of the numbers of ``config``.

    Raises:
      UserError: a freeze pattern that matches nothing, values out of range, layer-wise decay without layers.
    """
    _check_ranges(config)
    leaves = leaves_of(params, axes)
    frozen = frozen_mask(params, axes, config.freeze)
    by_path = paths_of(frozen)
    trained = {path: leaf for path, leaf in leaves.items() if by_path[path] is not True}
    partly = {path: rows for path, rows in by_path.items() if isinstance(rows, np.ndarray)}
    factors = _rate_factors(config.layer_decay, leaves, partly)

    limit: ArrayLike | None = config.clip_norm if tunable is None else tunable.clip_norm
    decay: ArrayLike = config.weight_decay if tunable is None else tunable.weight_decay

    steps = [_zero_rows(partly)] if partly else []
    if limit is not None:
        steps.append(_clip_by_global_norm(limit))
    steps.append(_rule(config, trained))
    if config.name != "adam" and (tunable is not None or config.weight_decay > 0):
        steps.append(_decay_weights(decay, leaves))
    if factors:
        steps.append(_scale_rows(factors))
    steps.append(optax.scale_by_learning_rate(schedule))
    optimizer = _in_float32(optax.chain(*steps))
    if len(trained) == len(leaves):
        return optimizer
    labels = map_paths(lambda path, _: "train" if path in trained else "frozen", params)
    return optax.partition({"train": optimizer, "frozen": optax.set_to_zero()}, labels)


def update_count(opt_state: optax.OptState) -> jax.Array:
    """Number of updates that a state of :func:`make_optimizer` has seen: the step of its schedule, which says the next rate."""

    def is_schedule(node: object) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    found = [node.count for node in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(node)]
    if len(found) != 1:
        raise ValueError(f"not a state of make_optimizer: {len(found)} schedules in it")
    return found[0]


def map_state(
    optimizer: optax.GradientTransformation,
    function: Callable[..., T],
    state: optax.OptState,
    *rest: PyTree,
    other: Callable[[jax.Array], T],
) -> PyTree[T]:
    """A tree like the optimizer's state, with each leaf mapped according to the parameter it belongs to.

    That is ``function(leaf, *values)``, ``values`` being the parameter's in the trees of ``rest``, and ``other(leaf)``
    where a leaf belongs to no parameter (counts and constants).

    Meant for shardings: such a leaf has the rank of its parameter, and in each dimension its size or 1 (Adafactor).
    """

    def is_masked(node: object) -> bool:
        return isinstance(node, optax.MaskedNode)

    return optax.tree_utils.tree_map_params(
        optimizer.init,
        lambda leaf, *values: leaf if is_masked(leaf) else function(leaf, *values),
        state,
        *rest,
        transform_non_params=other,
        is_leaf=is_masked,
    )


def global_norm(tree: PyTree[jax.Array]) -> jax.Array:
    """Euclidean norm of all leaves together, summed in float32 whatever their type."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros([], jnp.float32)))


def _check_ranges(config: OptimConfig) -> None:
    rules = [
        (config.weight_decay >= 0, "weight_decay", config.weight_decay, "must not be negative"),
        (config.eps > 0, "eps", config.eps, "must be above 0"),
        (0 <= config.momentum < 1, "momentum", config.momentum, "must lie in 0..1, below 1"),
        (0 < config.layer_decay <= 1, "layer_decay", config.layer_decay, "must lie in 0..1, above 0 (1: off)"),
    ]
    for holds, key, value, problem in rules:
        if not holds:
            raise UserError(f"optim.{key}={value}: {problem}")


def _rule(config: OptimConfig, trained: dict[str, Leaf]) -> optax.GradientTransformation:
    """From gradient to direction, sign and rate left out."""
    moment = config.momentum_dtype
    if moment is not None and config.name in ("sgd", "adafactor"):
        raise UserError(f"optim.momentum_dtype={moment}: {config.name} has no first moments; leave it out")
    if config.name in ("adamw", "adam"):
        return optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=moment)
    if config.name == "sgd":
        return optax.identity()
    if config.name in ("momentum", "nesterov"):
        return optax.trace(config.momentum, nesterov=config.name == "nesterov", accumulator_dtype=moment)
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2, mu_dtype=moment)
    if config.name == "adafactor":
        return scale_by_adafactor(trained)
    if config.name == "muon":
        return _muon(config, trained)
    raise UserError(f"optim.name={config.name}: no such optimizer")


def _muon(config: OptimConfig, trained: dict[str, Leaf]) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices inside the layers, each layer's apart; Adam for everything else.

    Embeddings, heads, biases and norms are not hidden matrices, and their authors train them with AdamW too.
    """
    contrib = optax.contrib
    if not hasattr(contrib, "scale_by_muon") or not hasattr(contrib, "MuonDimensionNumbers"):
        raise UserError(f"optim.name=muon: optax {optax.__version__} cannot do it; install optax 0.2.8 or newer")
    matrices = {path: leaf.matrix for path, leaf in trained.items() if leaf.layers is not None and leaf.matrix}
    if not matrices:
        raise UserError("optim.name=muon: no matrix inside the layers is trained; use adamw, or freeze less")

    def dimensions(updates: optax.Updates) -> Tree[optax.contrib.MuonDimensionNumbers]:
        return map_paths(lambda path, _: contrib.MuonDimensionNumbers(*matrices[path]), updates)

    rules: dict[Hashable, optax.GradientTransformation] = {
        "muon": optax.chain(
            contrib.scale_by_muon(
                beta=config.momentum, weight_dimension_numbers=dimensions, mu_dtype=config.momentum_dtype
            ),
            _scale_rows({path: _muon_scale(trained[path].shape, *sides) for path, sides in matrices.items()}),
        ),
        "adam": optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=config.momentum_dtype),
    }
    return optax.partition(rules, lambda tree: map_paths(lambda path, _: "muon" if path in matrices else "adam", tree))


def _muon_scale(shape: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]) -> np.float32:
    """An orthogonal A x B matrix has RMS 1 / sqrt(max(A, B))."""
    sides = [math.prod(shape[i] for i in side) for side in (inputs, outputs)]
    return np.float32(_MUON_RMS * max(sides) ** 0.5)


def _rate_factors(layer_decay: float, leaves: dict[str, Leaf], partly: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Factors of the rate by path, broadcastable to the parameter; only where they are not 1 throughout.

    Layer-wise decay as in BEiT (Bao et al. 2022), after ELECTRA (Clark et al. 2020): embeddings are at depth 0, layer i
    at depth i + 1, heads, poolers and final norms at depth L + 1, and the factor is layer_decay^(L + 1 - depth). Frozen
    layers of a stack have factor 0, which also keeps weight decay off them.
    """
    deepest = max((leaf.first_layer + (leaf.layers or 0) for leaf in leaves.values()), default=0)
    if layer_decay != 1 and deepest == 0:
        raise UserError(f"optim.layer_decay={layer_decay}: this model has no stacked layers; set it to 1")
    factors = {}
    for path, leaf in leaves.items():
        factor = np.ones(1)
        if leaf.layers is not None:
            factor = layer_decay ** np.arange(leaf.layers, 0, -1, dtype=np.float64)  # a stack ends with the last layer
        elif path.startswith("embed/"):
            factor = np.full(1, layer_decay ** (deepest + 1))
        if path in partly:
            factor = np.where(partly[path], 0.0, factor)
        if np.any(factor != 1):
            factors[path] = factor.reshape(-1, *[1] * (len(leaf.shape) - 1)).astype(np.float32)
    return factors


# The transformations below find their data by path rather than in a parallel tree: where optax masks parameters, trees
# have holes, and a parallel tree would need the same ones.


def _zero_rows(partly: dict[str, np.ndarray]) -> optax.GradientTransformation:
    """Gradients of frozen layers become 0 (also where they are not finite), before they can reach norm or moments."""

    def zero(path: str, grad: jax.Array) -> jax.Array:
        if path not in partly:
            return grad
        return jnp.where(partly[path].reshape(-1, *[1] * (grad.ndim - 1)), jnp.zeros_like(grad), grad)

    return optax.stateless(lambda updates, params: map_paths(zero, updates))


def _scale_rows(factors: Mapping[str, np.ndarray | np.float32]) -> optax.GradientTransformation:
    def scale(path: str, update: jax.Array) -> jax.Array:
        return update * factors[path] if path in factors else update

    return optax.stateless(lambda updates, params: map_paths(scale, updates))


def _decay_weights(rate: ArrayLike, leaves: dict[str, Leaf]) -> optax.GradientTransformation:
    def decay(path: str, update: jax.Array, param: jax.Array) -> jax.Array:
        return update + rate * param if leaves[path].decays else update

    return optax.stateless(lambda updates, params: map_paths(decay, updates, params))


def _clip_by_global_norm(limit: ArrayLike) -> optax.GradientTransformation:
    """Clips gradients as ``torch.nn.utils.clip_grad_norm_`` does, epsilon included. One factor for all fuses with the next step."""

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        factor = jnp.minimum(1.0, limit / (global_norm(updates) + 1e-6))
        return jax.tree.map(lambda update: update * factor, updates)

    return optax.stateless(clip)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner`` computed in float32 with its state stored as ``init`` made it.

    For float32 parameters nothing is cast. In bfloat16, JAX would round a decay of 0.999 to 1 before multiplying.
    """

    def widen(tree: T) -> T:
        narrow = (jnp.bfloat16, jnp.float16)
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype in narrow else x, tree)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new_state = inner.update(widen(updates), widen(state), widen(params))
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)

    return optax.GradientTransformation(inner.init, update)
