"""Matrix products with low-precision operands, float32 accumulation, and backward passes that keep little."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Float32, PyTree

from jaxft.layers.compute import Compute
from jaxft.layers.promotion import usual_promotion
from jaxft.parallel.sharding import DEFAULT_RULES, AxisNames, AxisRules, run_mesh, ways

Array = jax.Array
Tree = TypeVar("Tree")


def _batched(spec: str) -> bool:
    first, second, out = spec.replace("->", ",").split(",")
    return bool(set(first) & set(second) & set(out))


def _dot(spec: str, operand: str, result: str, x: Array, w: Array) -> Array:
    def direct(x: Array, w: Array, made: str = "float32") -> Array:
        # TPUs would round float32 operands without HIGHEST.
        precision = lax.Precision.HIGHEST if operand == "float32" else None
        y = jnp.einsum(spec, x.astype(operand), w.astype(operand), preferred_element_type=made, precision=precision)
        return y.astype(result)

    def narrow(x: Array, w: Array) -> Array:
        # TPUs and GPUs sum up in float32 whatever the result is. Asked for the final type at once, devices that split the
        # sum exchange numbers of that type: half the bytes.
        return direct(x, w, result)

    def widened(x: Array, w: Array) -> Array:
        wide = (y.astype(operand).astype(jnp.float32) for y in (x, w))
        return jnp.einsum(spec, *wide, preferred_element_type=jnp.float32).astype(result)

    if operand == "float32":
        return direct(x, w)
    if not _batched(spec):
        return direct(x, w) if result == "float32" else lax.platform_dependent(x, w, cpu=direct, default=narrow)
    # XLA's CPU backend (jaxlib 0.10.2) compiles some batched bf16 x bf16 -> f32 products and then fails to run them
    # ("UNIMPLEMENTED: Unsupported element type for DotThunk"). Products of bf16 numbers are exact in float32.
    return lax.platform_dependent(x, w, cpu=widened, default=narrow)


class _Product(NamedTuple):
    """How a product is computed."""

    operand: str
    """Type of both operands."""
    result: str
    """Type of the result."""
    gradient: str | None = None
    """Type of the second operand's gradient as it is summed up; None: as that operand."""
    rules: AxisRules = DEFAULT_RULES
    weight: AxisNames | None = None
    """Logical names of the second operand, if it is a weight."""
    recomputed: bool = False
    """Whether the product is computed again in the backward pass: what that gathers serves the gradient too."""

    @classmethod
    def of(cls, compute: Compute, weight: AxisNames | None) -> _Product:
        return cls(
            compute.matmul_dtype,
            compute.activation_dtype,
            compute.gradient_dtype,
            compute.rules,
            weight,
            compute.remat in ("full", "offload"),
        )

    def whole(self, w: Array) -> Array:
        """A weight as it is multiplied: rounded, and with the parts of its width gathered from the devices that keep them.

        Left to itself, libtpu (0.0.52) splits products with weights of 16 parts into as many products with one part each,
        which come from neighbour to neighbour: slow to multiply where a part is some 128 wide.
        """
        w = w.astype(self.operand)
        if self.weight is None:
            return w
        return self.rules.constrain(w, *(None if name == "embed" else name for name in self.weight))

    def again(self, w: Array, g: Array) -> tuple[Array, Array]:
        """A weight and the cotangent of its product, such that the weight is gathered again when the cotangent is known.

        Otherwise compilers keep what the forward pass has gathered, whole weights on each device, and were seen to hide less of
        the gathering. The placement has to be stated on both sides: it spreads through a barrier.
        """
        mesh = run_mesh()
        if self.recomputed or self.weight is None or "embed" not in self.weight:
            return w, g
        if mesh is None or ways(mesh, self.rules, "embed") == 1:
            return w, g
        w, g = lax.optimization_barrier((self.rules.constrain(w, *self.weight), g))
        return self.rules.constrain(w, *self.weight), g


_Kept = tuple[Array, Array, np.ndarray, np.ndarray]
"""The operands as they were multiplied, and empty arrays of the types that they had."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _einsum(spec: str, how: _Product, x: Array, w: Array) -> Array:
    return _dot(spec, how.operand, how.result, x, how.whole(w))


def _einsum_fwd(spec: str, how: _Product, x: Array, w: Array) -> tuple[Array, _Kept]:
    # The rounded operands are what the backward matmuls need: keeping them halves what is stored. Each device keeps its part.
    kept = (x.astype(how.operand), w.astype(how.operand), np.empty(0, x.dtype), np.empty(0, w.dtype))
    return _einsum(spec, how, x, w), kept


def _cpu_barrier(x: Array) -> Array:
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda y: y)


def cpu_after(x: Tree, *earlier: Array) -> Tree:
    """``x``, on a CPU not available before ``earlier`` are.

    XLA's CPU backend drops barriers before it decides the order of operations; it only heeds real dependencies. So a term
    is added that is 0 unless ``earlier`` is not finite, in a gradient that is then not used anyway. Over several devices
    the term would have to be sent around, so there it is left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return x

    def late(x: Tree, *earlier: Array) -> Tree:
        zero = lax.optimization_barrier(sum(y.reshape(-1)[0].astype(jnp.float32) * 0.0 for y in earlier))
        return jax.tree.map(lambda y: y + jnp.asarray(zero, y.dtype), x)

    return lax.platform_dependent(x, *earlier, cpu=late, default=lambda x, *_: x)


def recomputed_from(x: Tree, g: Array) -> tuple[Tree, Array]:
    """``x`` and the cotangent ``g``, such that what a backward pass computes from them is computed then.

    Without it, compilers find that the forward pass has computed the same already, and keep that.
    """
    x, g = lax.optimization_barrier((x, g))
    return cpu_after(x, g), g


def _einsum_bwd(spec: str, how: _Product, kept: _Kept, g: Array) -> tuple[Array, Array]:
    x, w, x_like, w_like = kept
    w, g = how.again(w, g)
    (first, second), out = spec.split("->")[0].split(","), spec.split("->")[1]
    dx = _einsum(f"{out},{second}->{first}", how._replace(result=str(x_like.dtype)), g, w)
    # Devices exchange what the product gives: it is widened afterwards.
    of_weight = how._replace(result=how.gradient or str(w_like.dtype), weight=None)
    if x.size <= g.size or _batched(spec):
        dw = _einsum(f"{first},{out}->{second}", of_weight, x, g)
    else:
        # XLA's CPU backend copies the left operand of this product transposed, recomputing whatever made it in the bad
        # order: let the smaller one be left. The barrier keeps XLA from swapping them back to save the small transpose.
        shared = set(out) & set(first)
        natural = "".join(c for c in out + first if c not in shared)
        product = _einsum(f"{out},{first}->{natural}", of_weight, g, x)
        dw = jnp.einsum(f"{natural}->{second}", _cpu_barrier(product))
    return dx, dw.astype(w_like.dtype)


_einsum.defvjp(usual_promotion(_einsum_fwd), usual_promotion(_einsum_bwd))


def dot(
    spec: str, x: Float[Array, "*_"], w: Float[Array, "*_"], compute: Compute, weight: AxisNames | None = None
) -> Float32[Array, "*_"]:
    """The einsum that :func:`einsum` is made of: float32 result, no gradient of its own. For use inside custom VJPs."""
    return _dot(spec, compute.matmul_dtype, "float32", x, _Product.of(compute, weight).whole(w))


def einsum(
    spec: str, x: Float[Array, "*_"], w: Float[Array, "*_"], compute: Compute, weight: AxisNames | None = None
) -> Float[Array, "*_"]:
    """Two-operand einsum with operands in ``compute.matmul_dtype`` and float32 accumulation, forwards and backwards.

    Every index must occur in two of the three terms (no sums or broadcasts inside one operand). Left to itself, autodiff
    multiplies the float32 cotangent with a widened copy of the bf16 operand, at float32 speed; hence the custom VJP.

    ``weight``: the logical names of ``w``, if it is one: its width is gathered for the product, as fully sharded data
    parallelism means it (Rajbhandari et al. 2020, ZeRO-3), in the operands' type.
    """
    return _einsum(spec, _Product.of(compute, weight), x, w)


Activation = Callable[[Array], Array]
Operand = Float[Array, "*_"] | tuple[Float[Array, "*_"], ...]
"""What is multiplied; for an activation of several arrays, all of them."""
OfOperand = Callable[[PyTree[Array]], Array]
"""An activation of one array or, for gated ones, of two."""


def affine(
    spec: str,
    x: Operand,
    w: Float[Array, "*_"],
    b: Float[Array, " E"] | None,
    compute: Compute,
    act: OfOperand | None = None,
    weight: AxisNames | None = None,
) -> Float[Array, "*_"]:
    """``einsum(spec, act(x), w, compute, weight) + b``, with ``b``, if any, along the one dimension of the result that ``w`` adds.

    An activation (of one array or, for gated ones, of a tuple of them) is computed again in the backward pass rather than
    kept: cheap, and as wide as an MLP.
    """
    return _affine(spec, act, _Product.of(compute, weight), x, w, b)


def _others(spec: str) -> tuple[int, ...]:
    """Dimensions of the result along which a bias is the same."""
    first, _, out = spec.replace("->", ",").split(",")
    return tuple(i for i, letter in enumerate(out) if letter in first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _affine(spec: str, act: OfOperand | None, how: _Product, x: PyTree[Array], w: Array, b: Array | None) -> Array:
    return _affine_fwd(spec, act, how, x, w, b)[0]


def _affine_fwd(
    spec: str, act: OfOperand | None, how: _Product, x: PyTree[Array], w: Array, b: Array | None
) -> tuple[Array, tuple[PyTree[Array], ...]]:
    y, (rounded, *rest) = _einsum_fwd(spec, how, x if act is None else act(x), w)
    if b is not None:
        y = y + jnp.expand_dims(b.astype(y.dtype), _others(spec))
    return y, (rounded if act is None else x, *rest, b)


def _affine_bwd(
    spec: str, act: OfOperand | None, how: _Product, kept: tuple[PyTree[Array], ...], g: Array
) -> tuple[PyTree[Array], Array, Array | None]:
    x, *rest, b = kept
    act_vjp: Callable[[Array], tuple[PyTree[Array]]] | None = None
    if act is not None:
        x, g = recomputed_from(x, g)
        x, act_vjp = jax.vjp(act, x)
        x = x.astype(how.operand)
    dx, dw = _einsum_bwd(spec, how, (x, *rest), g)
    db = None if b is None else g.astype(jnp.float32).sum(_others(spec)).astype(b.dtype)
    return dx if act_vjp is None else act_vjp(dx)[0], dw, db


_affine.defvjp(usual_promotion(_affine_fwd), usual_promotion(_affine_bwd))
