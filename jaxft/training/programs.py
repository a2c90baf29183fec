"""The compiled steps of a run: those that are needed first are compiled first, the others beside the training."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax

from jaxft.attention import Choice, choices, described
from jaxft.data.batch import Shape
from jaxft.data.loader import Batches
from jaxft.machine.memory import release_freed
from jaxft.machine.threads import Ahead
from jaxft.parallel.sharding import jitted, replicated
from jaxft.training.setup import Note, Setup
from jaxft.training.state import TrainState
from jaxft.training.step import make_eval_step

Kind = Literal["train", "eval"]
Name = tuple[Kind, Shape]
_THREADS = 2
"""XLA compiles a program mostly on one thread."""
_FEW_CORES = 4
"""With fewer, a second program that is compiled beside the first, and beside the loading of weights, holds up the first step."""
_LOOKED_AHEAD = 200
"""Steps that are looked through for the order in which shapes come."""


class Compiled(NamedTuple):
    """A program, and which attention backends it uses."""

    program: jax.stages.Compiled
    choices: list[Choice]


class Steps(Mapping[Shape, jax.stages.Compiled]):
    """The programs of one kind by batch shape. One that is still being compiled is waited for."""

    def __init__(self, kind: Kind, shapes: tuple[Shape, ...], ahead: Ahead[Name, Compiled]) -> None:
        self._kind: Kind = kind
        self._shapes, self._ahead = shapes, ahead

    def __getitem__(self, shape: Shape) -> jax.stages.Compiled:
        if shape not in self._shapes:
            raise KeyError(shape)
        return self._ahead.result((self._kind, shape)).program

    def __iter__(self) -> Iterator[Shape]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class Compilation:
    """What is still being compiled, and what is to be said of what has been."""

    def __init__(self, ahead: Ahead[Name, Compiled], attention: str) -> None:
        self._ahead, self._attention = ahead, attention
        self._done = 0
        self._said: set[tuple[str, str]] = set()

    def wait(self, kind: Kind, shapes: tuple[Shape, ...], given_up: Callable[[], bool] = lambda: False) -> bool:
        """Waits for programs; False if ``given_up`` has said so before all were there.

        Raises:
          UserError: a program that cannot be made, whichever it is.
        """
        return all(self._ahead.wait((kind, shape), given_up) for shape in shapes)

    def ready(self, kind: Kind, shape: Shape) -> bool:
        """Whether a program is there."""
        return self._ahead.ready((kind, shape))

    def news(self) -> list[str]:
        """Lines about the programs that are there since the last call.

        Raises:
          UserError: a program that cannot be made.
        """
        fresh = self._ahead.news()
        if not fresh:
            return []
        self._done += len(fresh)
        if self._done == len(self._ahead):
            release_freed()
        names = ", ".join(f"{kind} {shape}" for (kind, shape), _ in fresh)
        lines = [f"compiled {names} ({self._done} of {len(self._ahead)})"]
        chosen = [choice for _, compiled in fresh for choice in compiled.choices if choice.wanted == self._attention]
        new = [choice for choice in chosen if (choice.backend.name, choice.why) not in self._said]
        self._said |= {(choice.backend.name, choice.why) for choice in new}
        if new:
            lines += f"attention: {described(new, self._attention)}".replace("; ", "\n  ").splitlines()
        return lines

    def stop(self) -> None:
        """Compiles nothing that has not been begun."""
        self._ahead.stop()


@dataclass(frozen=True)
class Programs:
    """Compiled steps by batch shape; shared by all seeds of a run."""

    train: Mapping[Shape, Callable[..., Any]]
    """``(state, batch, seed) -> (state, metrics)``; where the recipe has ``updates``, with a
    :class:`~jaxft.training.optim.tunable.Tunable` besides."""
    evaluate: Mapping[Shape, jax.stages.Compiled]
    """``(params, batch)`` to what the scores are made of."""
    init: jax.stages.Wrapped
    """``params -> state``."""
    shapes: TrainState[jax.ShapeDtypeStruct]
    """The state, as shapes with shardings."""
    compilation: Compilation


def compile_programs(setup: Setup, note: Note, start: int = 0) -> Programs:
    """Begins to compile every step for every declared batch shape, in the order in which they will be needed.

    Args:
      start: the step that training begins or goes on at.
    """
    whole = replicated(setup.mesh)
    state, train = setup.state, setup.train_program()
    evaluate = jitted(make_eval_step(setup.model, setup.task), setup.mesh, whole)
    batches, held_out = setup.train_batches(setup.config.train.seed), setup.eval_batches()
    sizes = " x ".join("tokens" if axis == "length" else axis for axis, _ in batches.shapes()[0].sizes)
    scored = held_out.shapes()
    tested = () if setup.test is None else setup.test_batches().shapes()
    more = f", test {' '.join(map(str, tested))}" if tested else ""
    note(f"compiled shapes (rows x {sizes}): train {_shown(batches)}, eval {_shown(held_out)}{more}")

    def compiled(name: Name) -> Compiled:
        kind, shape = name
        with jax.set_mesh(setup.mesh), choices() as seen:  # both are per thread
            program, arguments = evaluate, (state.best_params, setup.batch(shape, scored=True))
            if kind == "train":
                program, arguments = train, setup.arguments(shape)
            return Compiled(program.lower(*arguments).compile(), list(seen.values()))

    more_scored = tuple(shape for shape in tested if shape not in scored)
    last: list[Name] = [("eval", shape) for shape in more_scored]
    order = [*needed(setup, batches, held_out, start), *last]
    note(f"compiling {len(order)} programs, {order[0][0]} {order[0][1]} first")
    ahead = Ahead(compiled, order, _THREADS, first_alone=(os.cpu_count() or 1) < _FEW_CORES)
    return Programs(
        Steps("train", batches.shapes(), ahead),
        Steps("eval", (*scored, *more_scored), ahead),
        jitted(setup.start, setup.mesh, jax.tree.map(lambda leaf: leaf.sharding, state), donate_argnums=0),
        state,
        Compilation(ahead, setup.config.model.attention),
    )


def needed(setup: Setup, batches: Batches, held_out: Batches, start: int) -> list[Name]:
    """The programs in the order in which a run that goes on at a step needs them, as far as it is looked ahead."""
    evaluated = min(start + setup.eval_every - start % setup.eval_every, setup.total_steps)
    wanted = batches.shapes()
    first: list[Name] = []
    for step in range(start, min(evaluated, start + _LOOKED_AHEAD)):
        name: Name = ("train", batches.shape_of(step))
        if name not in first:
            first.append(name)
            if len(first) == len(wanted):
                break
    rest: list[Name] = [("train", shape) for shape in batches.upcoming(start) if ("train", shape) not in first]
    return [*first, *(("eval", shape) for shape in held_out.shapes()), *rest]


def _shown(batches: Batches) -> str:
    return " ".join(map(str, batches.shapes()))
