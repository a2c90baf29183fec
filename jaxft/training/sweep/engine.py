"""A sweep from its first trial to its ranking, or from where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from jaxft import tasks
from jaxft.config import RunConfig, to_tree, to_yaml, with_overrides
from jaxft.errors import UserError
from jaxft.files import write_atomic
from jaxft.machine.lock import held
from jaxft.machine.memory import release_freed, resident_bytes
from jaxft.models.checks import check_rate
from jaxft.models.rates import chosen_rates
from jaxft.training.setup import check_config, stand_in_task
from jaxft.training.sweep.ledger import Finished, Ledger, open_ledger
from jaxft.training.sweep.ranking import Direction, Ranked, ranked, table_lines
from jaxft.training.sweep.samples import random_points
from jaxft.training.sweep.space import SEED, Point, Space
from jaxft.training.sweep.trial import Course, forget_state, rows_of, run_trial
from jaxft.training.sweep.workbench import Group, Workbench, program_key, varied_rates

Search = Literal["grid", "random", "tpe"]
Note = Callable[[str], None]


class Adviser(Protocol):
    """Chooses points by what came of earlier ones, and says which trials are worth going on with."""

    def point(
        self, number: int, finished: Sequence[Finished], points: Mapping[int, Point], direction: Direction
    ) -> Point:
        """Point number ``number``, the same whenever the points before have come to the same."""
        ...

    def hopeful(
        self,
        number: int,
        course: Course,
        finished: Sequence[Finished],
        points: Mapping[int, Point],
        direction: Direction,
    ) -> bool:
        """Whether a trial with these scores so far is worth going on with."""
        ...


@dataclass(frozen=True)
class Sweep:
    """What is asked for."""

    base: RunConfig
    """The run that points change."""
    space: Space
    search: Search
    seed: int
    """What points of a random search, and of TPE, are drawn from."""
    count: int | None
    """Points that a search tries; None: all of a grid."""
    prune: bool
    out: Path

    def config(self, point: Point, seed: int | None = None) -> RunConfig:
        """The run of a point.

        Raises:
          UserError: a value that its key does not take.
        """
        own = [f"{key}={text}" for key, text in point.items()]
        return with_overrides(self.base, [*own, *([] if seed is None else [f"{SEED}={seed}"])])

    def known(self) -> list[Point] | None:
        """Every point, where they do not depend on what came of others."""
        if self.search == "grid":
            return self.space.grid()
        if self.search == "random":
            assert self.count is not None
            return random_points(self.space, self.seed, self.count)
        return None

    def corners(self) -> list[Point]:
        """The points between which all others lie, and the choices of each key."""
        shares = (0.0, 1.0 - 2**-40)
        corners = [{key: one.at(share) for key, one in self.space.dimensions.items()} for share in shares]
        changed = [
            {**corners[0], key: text}
            for key, one in self.space.dimensions.items()
            for text in getattr(one, "texts", (one.at(shares[1]),))
        ]
        return [*corners, *changed]


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to."""

    rows: list[Ranked]
    metric: str
    direction: Direction
    interrupted: bool
    compiled: int
    """Train steps that were compiled."""
    shapes: int
    """Batch shapes of all programs."""
    groups: int
    trials: int
    """Trials that were run in this process."""
    resident: tuple[int, int]
    """Bytes of memory after the first of them and after the last."""


def run_sweep(sweep: Sweep, adviser: Adviser | None, note: Note) -> Outcome:
    """Runs all trials that are not finished yet.

    Args:
      adviser: chooses points and prunes; None: points are known, and no trial is given up.

    Raises:
      UserError: anything in the space, the run file, the data or the folder that cannot work.
    """
    known = sweep.known()
    points = sweep.corners() if known is None else known
    configs = [sweep.config(point) for point in points]
    for config in configs:
        _check(config)
    seeds = sweep.space.seeds or (configs[0].train.seed,)
    total = len(points) if known is not None else sweep.count
    assert total is not None
    task = stand_in_task(configs[0])
    metric = tasks.metric_of(task, configs[0].eval.metric)
    varied = varied_rates(configs)
    keys = [program_key(config, varied) for config in configs]
    with held(sweep.out, note), open_ledger(sweep.out, _head(sweep)) as ledger:
        return _Course(
            *(sweep, adviser, note, ledger, seeds, known, configs, varied, keys),
            *(total, metric, task.metrics[metric]),
        ).run()


def _check(config: RunConfig) -> None:
    if config.train.seeds:
        raise UserError(
            f"train.seeds={list(config.train.seeds)}: a sweep has its seeds as train.seed=0..4; leave it out"
        )
    for name, rate in chosen_rates(config.model.arch).items():
        check_rate(name, rate)  # of a model folder, whose Config is made for one trial of those that share a program
    check_config(config)


def _head(sweep: Sweep) -> dict[str, object]:
    tree = to_tree(sweep.base)
    for section, name in (("train", "out"), ("train", "compilation_cache"), ("train", "export")):
        del tree[section][name]
    flat = {f"{section}.{key}": value for section, keys in tree.items() for key, value in keys.items()}
    for key in ("log", "mesh"):
        flat = {name: value for name, value in flat.items() if not name.startswith(f"{key}.")}
    search = {"--search": sweep.search, "--seed": sweep.seed, "--prune": sweep.prune}
    return {"search": search, "space": dict(sweep.space.typed), "settings": flat}


@dataclass
class _Course:
    """The sweep while it runs."""

    sweep: Sweep
    adviser: Adviser | None
    note: Note
    ledger: Ledger
    seeds: tuple[int, ...]
    known: list[Point] | None
    configs: list[RunConfig]
    """One for each point; where points are not known, for each corner of the space."""
    varied: frozenset[str]
    """Rates of dropout that are arguments of programs."""
    keys: list[str]
    """What the programs of each depend on."""
    total: int
    metric: str
    direction: Direction
    ran: int = 0
    resident: tuple[int, int] = (0, 0)

    def run(self) -> Outcome:
        """Runs the trials that are left, in the order of their programs where points are known."""
        bench = Workbench(self.note, self.varied)
        done = len(self.ledger.finished)
        if done:
            self.note(f"{done} of {self.total * len(self.seeds)} trials are finished already ({self.sweep.out})")
        for config in dict(zip(reversed(self.keys), reversed(self.configs), strict=True)).values():
            bench.check(config)
        interrupted = False
        for number in self._order():
            if self._whole(number):
                for seed in self.seeds:  # left by a crash between the ledger and this
                    forget_state(self._folder(number, seed))
                continue
            point = self._point(number)
            group = self._group(bench, self.sweep.config(point))
            if self._point_stopped(number, point, group):
                interrupted = True
                break
        for one in bench.groups.values():
            one.programs.compilation.stop()
        counts = [one.compiled() for one in bench.groups.values()]
        return Outcome(
            rows=self._write(),
            metric=self.metric,
            direction=self.direction,
            interrupted=interrupted,
            compiled=sum(count for count, _ in counts),
            shapes=sum(shapes for _, shapes in counts),
            groups=len(counts),
            trials=self.ran,
            resident=self.resident,
        )

    def _order(self) -> list[int]:
        """Numbers of the points, those that share programs together."""
        numbers = list(range(self.total))
        if self.known is None:
            return numbers
        return sorted(numbers, key=lambda number: self.keys.index(self.keys[number]))

    def _point(self, number: int) -> Point:
        if self.known is not None:
            return self.known[number]
        if number in self.ledger.points:
            return self.ledger.points[number]
        assert self.adviser is not None
        finished = list(self.ledger.finished.values())
        return self.adviser.point(number, finished, self.ledger.points, self.direction)

    def _group(self, bench: Workbench, config: RunConfig) -> Group:
        key = program_key(config, self.varied)
        if self.known is not None:
            alike = [one for one, its in zip(self.configs, self.keys, strict=True) if its == key]
            return bench.group(key, config, alike, alike)
        # A corner has the most steps, or the most epochs, that any point has.
        lengths = [(one.train.steps, one.train.epochs) for one in self.configs]
        longer = [
            dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps, epochs=epochs))
            for steps, epochs in dict.fromkeys(lengths)
        ]
        return bench.group(key, config, longer, [config])

    def _point_stopped(self, number: int, point: Point, group: Group) -> bool:
        """Runs what is left of a point's trials; whether a signal stopped one."""
        for place, seed in enumerate(self.seeds):
            out = self._folder(number, seed)
            if (number, seed) in self.ledger.finished:
                forget_state(out)
                continue
            if place and self._pruned(number):
                break
            self._check_rows(point, group)
            self.ledger.begin(number, seed, point)
            began = time.perf_counter()
            config = self.sweep.config(point, seed)

            def hopeful(course: Course, place: int = place) -> bool:
                if not self.sweep.prune or self.adviser is None or place:
                    return True  # a point is judged by its first seed
                finished = list(self.ledger.finished.values())
                return self.adviser.hopeful(number, course, finished, self.ledger.points, self.direction)

            result = run_trial(group, config, out, number, seed, self.note, hopeful)
            if result is None:
                return True
            self.ledger.finish(result)
            forget_state(out)
            self._tell(result, point, time.perf_counter() - began)
        return False

    def _pruned(self, number: int) -> bool:
        return any(one.state == "pruned" for (point, _), one in self.ledger.finished.items() if point == number)

    def _folder(self, number: int, seed: int) -> Path:
        return self.sweep.out / "trials" / f"{number:04d}-seed{seed}"

    def _whole(self, number: int) -> bool:
        """Whether nothing is left to do of a point."""
        return self._pruned(number) or all((number, seed) in self.ledger.finished for seed in self.seeds)

    def _check_rows(self, point: Point, group: Group) -> None:
        """Raises UserError if the rows are not those that finished trials were run on."""
        rows = rows_of(group.setup)
        own = {key: text for key, text in point.items() if key.split(".")[0] in ("data", "task", "model")}
        alike = [one for one in self.ledger.finished.values() if own.items() <= self.ledger.points[one.point].items()]
        before = next((one for one in alike if one.rows != rows), None)
        if before is not None:
            raise UserError(
                f"{self.sweep.out}: the rows of {group.setup.config.data.train} (or their tokenizer) have changed since trial "
                f"{before.point} of seed {before.seed}; scores would not be comparable: give another --out"
            )

    def _tell(self, result: Finished, point: Point, seconds: float) -> None:
        """A line for a trial that has ended, and the files of results."""
        self.ran += 1
        release_freed()
        now = resident_bytes() or 0
        self.resident = (self.resident[0] or now, now)
        rows = self._write()
        values = " ".join(f"{key.split('.')[-1]}={text}" for key, text in point.items())
        score = "n/a" if result.value is None else f"{result.value:.4f}"
        state = "" if result.state == "done" else f" {result.state}"
        done, total = len(self.ledger.finished), self.total * len(self.seeds)
        best = f" | best so far: point {rows[0].number}, {rows[0].mean:.4f}" if rows and not rows[0].remark else ""
        self.note(
            f"trial {done:>{len(str(total))}}/{total} | {values} seed={result.seed} | {self.metric} {score}{state} "
            f"(step {result.best_step} of {result.steps}) | {seconds:.1f} s{best}"
        )

    def _write(self) -> list[Ranked]:
        """Writes the ranking and the winner's run file."""
        metric, direction = self.metric, self.direction
        rows = ranked(self.ledger.points, list(self.ledger.finished.values()), self.seeds, direction)
        out = self.sweep.out
        write_atomic(out / "results.md", "\n".join(table_lines(rows, metric, direction)) + "\n")
        ranking = [dataclasses.asdict(one) | {"mean": one.mean if one.scores else None} for one in rows]
        tree = {"metric": metric, "direction": direction, "seeds": list(self.seeds), "ranking": ranking}
        write_atomic(out / "results.json", json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
        if rows and not rows[0].remark:
            config = self.sweep.config(rows[0].values, self.seeds[0])
            write_atomic(out / "best.yaml", _header(rows[0], metric, len(self.seeds)) + to_yaml(config))
        return rows


def _header(best: Ranked, metric: str, seeds: int) -> str:
    values = ", ".join(f"{key}={text}" for key, text in best.values.items())
    spread = "" if best.sd is None else f" +- {best.sd:.4f}"
    return (
        f"# The best point of a sweep: {values}\n# {metric} {best.mean:.4f}{spread}, {seeds} seed{'s' * (seeds > 1)}; "
        f"this is the run of the first of them\n"
    )
