"""A program computed again operation by operation, to find the one where numbers stop being finite.

jax's own ``jax_debug_nans`` stops at the first NaN of a whole compiled program, or of any operation, meant or not, and sees no
infinities. Here every operation of the program is looked at, inside of loops, branches, checkpoints and custom derivatives too, and
what is found lies on the way to the results (:mod:`jaxft.training.origins`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.extend.source_info_util import summarize

from jaxft.training.gradients import MICRO_BATCHES
from jaxft.training.origins import Value, finite, handed_on, shown

_PACKAGE = Path(__file__).parents[2]
_TRANSFORMS = re.compile(r"\b(?:jvp|transpose|vmap)\(|\)|rematted_computation/?")
# Scopes of :mod:`jaxft.layers.stacks`: a loop over layers (the first one, layers of a turn), a layer of a turn, a layer outside of loops.
_LAYERS, _PART, _LAYER = re.compile(r"layers_(\d+)_(\d+)$"), re.compile(r"\bpart_(\d+)"), re.compile(r"\blayer_(\d+)")


class Turn(NamedTuple):
    """One turn of a loop."""

    scope: str
    line: str
    number: int
    of: int | None
    """None: the loop does not say how often it turns."""


class Place(NamedTuple):
    """Where in the program."""

    scope: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Something that gave a number that is not finite, from finite ones."""

    what: str
    scope: str = ""
    """Modules and scopes of the model, with jax's transformations as it writes them."""
    line: str = ""
    turns: tuple[Turn, ...] = ()

    def where(self) -> str:
        """Module, layer, line: as far as they are known."""
        module, layer = _module(self.scope), None
        loops = []
        for turn in self.turns:
            scope = _plain(turn.scope)
            if found := _LAYERS.search(scope):
                part = _PART.search(_plain(self.scope))
                layer = int(found[1]) + turn.number * int(found[2]) + (int(part[1]) if part else 0)
            elif scope.endswith(MICRO_BATCHES):
                loops.append(f"micro-batch {turn.number + 1} of {turn.of}")
            elif turn.of != 1:
                of = "" if turn.of is None else f" of {turn.of}"
                loops.append(f"turn {turn.number + 1}{of} of the loop at {turn.line}")
        if found := _LAYER.search(_plain(self.scope)):
            layer = int(found[1])
        parts = [f"in {module}" if module else "", "" if layer is None else f"layer {layer}", *loops, self.line]
        return ", ".join(part for part in parts if part)


def _plain(scope: str) -> str:
    """A scope without jax's transformations."""
    return _TRANSFORMS.sub("", scope).strip("/")


def _module(scope: str) -> str:
    """The path of a module as parameters have it: no names of classes, no equations of products; layers as ``layers``."""
    parts: list[str] = []
    for part in _plain(scope).split("/"):
        if _LAYER.fullmatch(part) or _LAYERS.fullmatch(part):
            parts = ["layers"]
        elif (
            part and not part[0].isupper() and "->" not in part and part != MICRO_BATCHES and not _PART.fullmatch(part)
        ):
            parts.append(part)
        elif "." in part and "->" not in part:
            parts.append(part.rpartition(".")[2])
    return "/".join(parts)


def first_not_finite(program: ClosedJaxpr, arguments: Mapping[str, jax.Array]) -> str:
    """Names what first gave a number that is not finite; empty if all results are finite.

    It is the first operation, in the order of the program, whose numbers reach the loss; where the loss is finite, a gradient.

    Args:
      program: its results are a loss and gradients.
      arguments: by what they are to be called.
    """
    replay = Replay()
    loss, *gradients = replay.run(program, [replay.argument(name, array) for name, array in arguments.items()])
    for way, results in (("forward", [loss]), ("backward", gradients)):
        numbers = {int(number) for value in results if value.origins is not None for number in np.unique(value.origins)}
        if spoilt := sorted(numbers - {0}, key=lambda number: (number < 0, number)):
            origin = replay.of(spoilt[0])
            where = origin.where()
            return f"{origin.what}, {where}, {way} pass" if where else origin.what
    return ""


@dataclass
class Replay:
    """A program under way, and what was found in it."""

    found: list[Origin] = field(default_factory=list)
    """Origins by their number less one."""

    def of(self, number: int) -> Origin:
        """The origin of a number in :attr:`Value.origins`."""
        return self.found[abs(number) - 1]

    def argument(self, name: str, array: jax.Array) -> Value:
        """An argument of the program; if it is not finite, that is where it begins."""
        if finite(array):
            return Value(array)
        self.found.append(Origin(f"{name} is not finite"))
        return Value(array, np.where(np.isfinite(np.asarray(array)), 0, len(self.found)).astype(np.int32))

    def run(self, program: ClosedJaxpr, arguments: Sequence[Value], place: Place = Place()) -> list[Value]:  # noqa: B008
        """Computes a program's outputs."""
        jaxpr: Jaxpr = program.jaxpr
        last = {v: eqn for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var)}
        kept = {v for v in jaxpr.outvars if isinstance(v, Var)}
        known = dict(zip(jaxpr.constvars, (self._constant(c) for c in program.consts), strict=True))
        known |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Var | Literal) -> Value:
            return self._constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            inputs = [read(atom) for atom in eqn.invars]
            known |= dict(zip(eqn.outvars, self._apply(eqn, inputs, place), strict=True))
            for v in (*eqn.invars, *eqn.outvars):  # nothing is held longer than a compiled program would
                if isinstance(v, Var) and v not in kept and (v not in last or last[v] is eqn):
                    known.pop(v, None)
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value: object) -> Value:
        array = jnp.asarray(value)
        if finite(array):
            return Value(array, constant=True)
        numbers = np.asarray(array)
        self.found.append(
            Origin("a constant of the program is NaN" if np.isnan(numbers).any() else "a constant is infinite")
        )
        sign = np.where(np.isnan(numbers), 1, -1) * len(self.found)
        return Value(array, np.where(np.isfinite(numbers), 0, sign).astype(np.int32), constant=True)

    def _apply(self, eqn: JaxprEqn, inputs: list[Value], place: Place) -> list[Value]:
        inside = _INSIDE.get(eqn.primitive.name)
        if inside is None or not any(_is_float(v) for v in eqn.outvars):
            return self._computed(eqn, inputs, place)
        scope = "/".join(part for part in (place.scope, str(eqn.source_info.name_stack)) if part)
        return inside(self, eqn, inputs, Place(scope, place.turns))

    def _computed(self, eqn: JaxprEqn, inputs: list[Value], place: Place) -> list[Value]:
        """The outputs of a single operation."""
        outputs = _alone(eqn)(*(v.array for v, a in zip(inputs, eqn.invars, strict=True) if isinstance(a, Var)))
        constant = all(value.constant for value in inputs)
        return [self._judged(eqn, number, out, inputs, place, constant) for number, out in enumerate(outputs)]

    def _judged(
        self, eqn: JaxprEqn, number: int, array: jax.Array, inputs: list[Value], place: Place, constant: bool
    ) -> Value:
        if finite(array):
            return Value(array, constant=constant)
        out = np.asarray(array)
        bad, is_nan = ~np.isfinite(out), np.isnan(out)
        origins = np.where(bad, handed_on(eqn, number, out, inputs), 0).astype(np.int32)
        fresh = bad & ((origins == 0) | (is_nan & (origins < 0)))
        if fresh.any():
            first = tuple(int(i) for i in np.argwhere(fresh & is_nan if (fresh & is_nan).any() else fresh)[0])
            count = int(fresh.sum())
            many = "" if out.size == 1 else f" in {count:,} of {out.size:,} numbers"
            scope = "/".join(part for part in (place.scope, str(eqn.source_info.name_stack)) if part)
            what = f"{shown(eqn, first, inputs, out)}{many}"
            self.found.append(Origin(what, scope, _line(eqn), place.turns))
            meant = constant and not is_nan.any()
            origins[fresh] = -len(self.found) if meant else len(self.found)
        return Value(array, origins, constant)


def _is_float(v: Var) -> bool:
    dtype = getattr(v.aval, "dtype", None)  # tokens that order effects have none
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


@functools.cache
def _empty() -> Jaxpr:
    return jax.make_jaxpr(lambda: ())().jaxpr


def _alone(eqn: JaxprEqn) -> Callable[..., Sequence[jax.Array]]:
    """A single operation as a function of its inputs, literals left out."""
    # Twice the same variable is two arguments here, the second of which is the one that is read: they are the same array.
    given = [atom for atom in eqn.invars if isinstance(atom, Var)]
    single = _empty().replace(invars=given, outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects)
    return jaxpr_as_fun(ClosedJaxpr(single, []))


def _line(eqn: JaxprEqn) -> str:
    """Source file and line, the file as in the package where it is of it."""
    said = summarize(eqn.source_info).partition(" ")[0]
    path = re.sub(r":\d+$", "", said)  # without the column
    return path.removeprefix(f"{_PACKAGE}/")


_Inside = Callable[[Replay, JaxprEqn, list[Value], Place], list[Value]]


def _called(key: str) -> _Inside:
    def inside(replay: Replay, eqn: JaxprEqn, inputs: list[Value], place: Place) -> list[Value]:
        return replay.run(_closed(eqn.params[key]), inputs, place)

    return inside


def _closed(program: ClosedJaxpr | Jaxpr) -> ClosedJaxpr:
    return program if isinstance(program, ClosedJaxpr) else ClosedJaxpr(program, [])


def _turned(eqn: JaxprEqn, place: Place, number: int, of: int | None) -> Place:
    return Place(place.scope, (*place.turns, Turn(place.scope, _line(eqn), number, of)))


def _scan(replay: Replay, eqn: JaxprEqn, inputs: list[Value], place: Place) -> list[Value]:
    consts, carried, length = eqn.params["num_consts"], eqn.params["num_carry"], eqn.params["length"]
    fixed, carry, rows = inputs[:consts], inputs[consts : consts + carried], inputs[consts + carried :]
    made: list[list[Value]] = [[] for _ in range(length)]
    turns = reversed(range(length)) if eqn.params["reverse"] else range(length)
    for turn in turns:
        own = [_row(value, turn) for value in rows]
        outputs = replay.run(eqn.params["jaxpr"], [*fixed, *carry, *own], _turned(eqn, place, turn, length))
        carry, made[turn] = outputs[:carried], outputs[carried:]
    if not length:
        return replay._computed(eqn, inputs, place)
    return [*carry, *(_stacked(each) for each in zip(*made, strict=True))]


def _row(value: Value, number: int) -> Value:
    origins = None if value.origins is None else value.origins[number]
    if origins is not None and not origins.any():
        origins = None
    return Value(value.array[number], origins, value.constant)


def _stacked(values: Sequence[Value]) -> Value:
    array, constant = jnp.stack([value.array for value in values]), all(value.constant for value in values)
    if all(value.origins is None for value in values):
        return Value(array, constant=constant)
    zeros = np.zeros(values[0].array.shape, np.int32)
    return Value(array, np.stack([zeros if v.origins is None else v.origins for v in values]), constant)


def _while(replay: Replay, eqn: JaxprEqn, inputs: list[Value], place: Place) -> list[Value]:
    for_test, for_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test = jax.jit(jaxpr_as_fun(eqn.params["cond_jaxpr"]))
    given, fixed, carry = inputs[:for_test], inputs[for_test : for_test + for_body], inputs[for_test + for_body :]
    turn = 0
    while bool(test(*(value.array for value in (*given, *carry)))[0]):
        carry = replay.run(eqn.params["body_jaxpr"], [*fixed, *carry], _turned(eqn, place, turn, None))
        turn += 1
    return carry


def _cond(replay: Replay, eqn: JaxprEqn, inputs: list[Value], place: Place) -> list[Value]:
    branches = eqn.params["branches"]
    chosen = branches[int(np.clip(int(inputs[0].array), 0, len(branches) - 1))]
    return replay.run(_closed(chosen), inputs[1:], place)


_INSIDE: dict[str, _Inside] = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint"), _called("jaxpr")),
    **dict.fromkeys(("closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"), _called("call_jaxpr")),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
"""Primitives that hold programs of their own. Others are looked at from outside: kernels, library calls."""
