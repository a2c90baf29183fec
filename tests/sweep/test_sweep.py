"""Sweeps: the space as it is typed, the ledger, the ranking, and whole sweeps on a tiny model that are stopped and go on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import typing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_xla import quick_flags
from tiny import refusal
from tiny_run import config_of

from jaxft.config import OptimConfig, RunConfig
from jaxft.errors import UserError
from jaxft.parallel.sharding import make_mesh
from jaxft.training import loop, recipe, setup
from jaxft.training.optim import make_schedule
from jaxft.training.optim.tunable import table_schedule, tunable_of
from jaxft.training.programs import compile_programs
from jaxft.training.sweep.engine import Outcome, Sweep, run_sweep
from jaxft.training.sweep.ledger import Finished, open_ledger
from jaxft.training.sweep.ranking import ranked
from jaxft.training.sweep.samples import random_points
from jaxft.training.sweep.space import Choices, Range, parse_space

Capture = pytest.CaptureFixture[str]


# ---------------------------------------------------------------------------------------------------------- the space


def test_values_ranges_and_what_is_fixed() -> None:
    space = parse_space(
        ["optim.learning_rate=1e-5..1e-3:log:3", "train.seed=0..4", "train.batch_size=8,16", "data.max_length=64"],
        "classification",
    )
    assert space.seeds == (0, 1, 2, 3, 4)
    assert space.fixed == ("data.max_length=64",)
    assert space.dimensions["train.batch_size"] == Choices(("8", "16"))
    assert [tuple(point.values()) for point in space.grid()] == [
        (rate, size) for rate in ("1e-05", "0.0001", "0.001") for size in ("8", "16")
    ]


def test_commas_inside_lists_mappings_and_quotes_are_no_choice() -> None:
    space = parse_space(
        [
            "optim.step_fractions=[0.5,0.75],[0.3,0.6]",
            "model.arch={hidden_dropout_prob: 0.1, num_labels: 2}",
            "data.text='a,b'",
        ],
        "classification",
    )
    assert space.dimensions == {"optim.step_fractions": Choices(("[0.5,0.75]", "[0.3,0.6]"))}
    assert len(space.fixed) == 2


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["optim.learning_rat=1,2"], "unknown config key 'optim.learning_rat'"),
        (["optim.learning_rate=1e-3..1e-5"], "is empty: 1e-3 is not below 1e-5"),
        (["optim.learning_rate=1e-5..:log"], "is no range"),
        (["optim.learning_rate=0..1e-3:log"], "begins above 0"),
        (["optim.learning_rate=1e-5..1e-3:log"], "a grid needs to know how many values"),
        (["train.batch_size=8..16.5"], "takes whole numbers"),
        (["optim.learning_rate=1e-4,1e-4"], "has 1e-4 twice"),
        (["optim.learning_rate=1e-4", "train.seed=0"], "nothing varies"),
        (["optim.learning_rate=1,2", "optim.learning_rate=3"], "is given twice"),
        (["train.seed=a,b"], "seeds are whole numbers"),
        (["train.seed=0..999999999"], "1000000000 seeds, at most 100000"),
        (["optim.warmup_steps=0..300000000"], "300000001 points, at most 100000"),
        (["optim.learning_rate=1e-5..1e-3:log:4000", "optim.warmup_steps=0..99"], "400000 points, at most 100000"),
        (["train.seeds=[0,1]"], "write train.seed=0..4"),
        (["eval.metric=loss,accuracy"], "one metric ranks all"),
    ],
)
def test_spaces_that_are_none(typed: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("[", r"\[")):
        parse_space(typed, "classification").grid()


def test_random_points_are_functions_of_seed_and_number() -> None:
    space = parse_space(["optim.learning_rate=1e-5..1e-3:log", "optim.warmup_steps=0..9"], "classification")
    points = random_points(space, 3, 200)
    assert points[:7] == random_points(space, 3, 7)
    assert points[:7] != random_points(space, 4, 7)
    rates = [float(point["optim.learning_rate"]) for point in points]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 70 <= sum(rate < 1e-4 for rate in rates) <= 130  # as likely in each decade
    assert {int(point["optim.warmup_steps"]) for point in points} == set(range(10))


def test_random_points_of_few_are_all_of_them_in_another_order() -> None:
    space = parse_space(["optim.name=adamw,lion,sgd", "optim.warmup_steps=0..3"], "classification")
    points = random_points(space, 0, 12)
    assert sorted(map(str, points)) == sorted(map(str, space.grid()))
    assert points != space.grid()
    with pytest.raises(UserError, match="the space has 12 points"):
        random_points(space, 0, 13)


def test_rounding_does_not_leave_a_range() -> None:
    narrow = Range(1.23456e-5, 1.23457e-5, log=True, count=None, whole=False)
    assert all(narrow.low <= float(narrow.at(share)) <= narrow.high for share in (0.0, 0.3, 0.999))
    whole = Range(1, 3, log=True, count=None, whole=True)
    assert Counter(whole.at(i / 300) for i in range(300)).keys() == {"1", "2", "3"}


# --------------------------------------------------------------------------------------------------- tables of rates


@pytest.mark.parametrize("name", typing.get_args(typing.get_type_hints(OptimConfig)["schedule"]))
def test_a_table_holds_the_rates_that_a_step_computes(name: typing.Any) -> None:
    config = OptimConfig(schedule=name, learning_rate=3.3e-3, end_factor=0.1)
    table = tunable_of(config, 37, 42).rates
    one = jax.jit(make_schedule(config, 37))
    wanted = np.stack([one(jnp.int32(step)) for step in range(37)])
    # The same bits, but for the flags that make this suite compile quickly.
    np.testing.assert_array_max_ulp(table[:37], wanted, maxulp=4)
    assert float(jax.jit(lambda rates, step: table_schedule(rates)(step))(table, 36)) == table[36]
    assert set(table[37:]) == {table[36]}


# ---------------------------------------------------------------------------------------------------------- the ledger


HEAD = {"search": {"--search": "grid"}, "space": {"optim.learning_rate": "1,2"}, "settings": {"train.steps": 3}}


def result(point: int, seed: int, value: float | None, state: str = "done") -> Finished:
    metrics = {"accuracy": math.nan if value is None else value}
    course = () if value is None else ((3, value),)
    return Finished(point, seed, state, value, 3, 3, metrics, course, "a/b")  # type: ignore[arg-type]


def test_a_ledger_is_read_back_but_for_a_line_cut_short(tmp_path: Path) -> None:
    with open_ledger(tmp_path, HEAD) as ledger:
        ledger.begin(0, 0, {"optim.learning_rate": "1"})
        ledger.finish(result(0, 0, 0.5))
        ledger.begin(1, 0, {"optim.learning_rate": "2"})
        ledger.finish(result(1, 0, None, "diverged"))
        with pytest.raises(ValueError, match="was finished before"):
            ledger.finish(result(0, 0, 0.6))
    whole = (tmp_path / "sweep.jsonl").read_bytes()
    for cut in (1, 30):
        (tmp_path / "sweep.jsonl").write_bytes(whole[:-cut])
        with open_ledger(tmp_path, HEAD) as ledger:
            assert ledger.finished == {(0, 0): result(0, 0, 0.5)}
            assert ledger.begun == {(0, 0), (1, 0)}
            ledger.finish(result(1, 0, 0.7))
        with open_ledger(tmp_path, HEAD) as ledger:
            assert ledger.finished[1, 0].value == 0.7


def test_a_ledger_of_another_sweep_or_at_work_is_refused(tmp_path: Path) -> None:
    with open_ledger(tmp_path, HEAD), pytest.raises(UserError, match="another jaxft sweep is at work"):
        open_ledger(tmp_path, HEAD).__enter__()
    other = HEAD | {"space": {"optim.learning_rate": "1,3"}}
    with open_ledger(tmp_path, other):  # no trial was begun of what was there
        pass
    with open_ledger(tmp_path, HEAD) as ledger:
        ledger.begin(0, 0, {"optim.learning_rate": "1"})
    with pytest.raises(UserError, match=r"optim.learning_rate was 1,2, now 1,3"):
        open_ledger(tmp_path, other).__enter__()
    (tmp_path / "sweep.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"sweep.jsonl:1: no record of a sweep"):
        open_ledger(tmp_path, HEAD).__enter__()


def test_points_are_ranked_by_mean_and_those_that_lack_something_come_last() -> None:
    points = {number: {"key": str(number)} for number in range(5)}
    finished = [
        *(result(0, seed, value) for seed, value in ((0, 0.5), (1, 0.7))),
        *(result(1, seed, value) for seed, value in ((1, 0.6), (0, 0.7))),
        result(2, 0, 0.9),
        *(result(3, 0, 0.99), result(3, 1, None, "diverged")),
        result(4, 0, 0.95, "pruned"),
    ]
    rows = ranked(points, finished, (0, 1), "max")
    assert [row.number for row in rows] == [1, 0, 3, 4, 2]
    assert rows[0].scores == (0.7, 0.6)
    assert rows[0].mean == pytest.approx(0.65)
    assert rows[0].sd == pytest.approx(math.sqrt(0.005))
    assert [row.remark for row in rows] == ["", "", "diverged", "pruned", "1 of 2 seeds"]
    assert [row.number for row in ranked(points, finished, (0, 1), "min")][:2] == [0, 1]


# -------------------------------------------------------------------------------------------------------- whole sweeps

TYPED = ("optim.learning_rate=1e-3,1e-2", "train.steps=5,7", "train.seed=0..1")


def sweep_of(base: RunConfig, out: Path, *typed: str) -> Sweep:
    return Sweep(base, parse_space(typed or TYPED, "classification"), "grid", 0, None, False, out)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return config_of(
        tmp_path_factory.mktemp("base"),
        "eval.every=4",
        "train.log_every=1",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
    )


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))


class Stopped(Exception):
    """What stands for the death of a process."""


def stopping_at(trials: int) -> Callable[[str], None]:
    lines = []

    def note(line: str) -> None:
        lines.append(line)
        if sum(one.startswith("trial ") for one in lines) == trials:
            raise Stopped

    return note


def test_one_step_serves_all_trials_each_runs_once_and_gives_the_bits_of_train(
    base: RunConfig, one_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[object] = []
    made = recipe.make_train_step
    monkeypatch.setattr(recipe, "make_train_step", lambda *a, **k: [traced.append(a), made(*a, **k)][1])
    sweep = sweep_of(base, tmp_path / "sweep")
    ran: Counter[str] = Counter()
    fit = loop.fit

    def counted(*arguments: object) -> object:
        ran[Path(str(arguments[2])).name] += 1
        return fit(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("jaxft.training.sweep.trial.fit", counted)
    with pytest.raises(Stopped):
        run_sweep(sweep, None, stopping_at(3))
    outcome: Outcome = run_sweep(sweep, None, lambda line: None)
    assert (outcome.trials, outcome.compiled, outcome.groups) == (5, 1, 1)
    assert set(ran.values()) == {1}
    assert len(ran) == 8
    # For each process, the ordinary step is built (not traced), and the one that takes arguments is traced once.
    assert len(traced) == 4
    assert not list((tmp_path / "sweep").rglob("checkpoints"))

    best = json.loads((tmp_path / "sweep/results.json").read_text())["ranking"][0]
    assert best["mean"] == pytest.approx(np.mean(best["scores"]))
    # The same numbers as constants of an ordinary run.
    config = dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, learning_rate=1e-2),
        train=dataclasses.replace(base.train, steps=7, seed=1),
    )
    ready = setup.prepare(config, lambda line: None, setup.Times())
    fit(ready, compile_programs(ready, lambda line: None), tmp_path / "alone", 1, lambda line: None, setup.Times())
    trial = tmp_path / "sweep/trials/0003-seed1"
    assert (trial / "log.jsonl").read_bytes() == (tmp_path / "alone/log.jsonl").read_bytes()


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_run import config_of
from jaxft.training.sweep.engine import Sweep, run_sweep
from jaxft.training.sweep.space import parse_space
folder = Path(sys.argv[2])
base = config_of(folder / "rows", "train.steps=60", "eval.every=10", "train.log_every=5")
space = parse_space(["optim.learning_rate=1e-3,1e-2,3e-2", "train.seed=0..1"], "classification")
run_sweep(Sweep(base, space, "grid", 0, None, False, folder / sys.argv[3]), None, lambda line: print(line, flush=True))
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()

    def start(out: str) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent.parent), str(tmp_path), out]
        flags = {"XLA_FLAGS": quick_flags()}
        return subprocess.Popen(arguments, env=os.environ | flags, stdout=subprocess.PIPE, text=True)

    with start("whole") as child:
        child.communicate(timeout=300)
    assert child.returncode == 0
    rng, killed = random.Random(0), 0
    while True:
        with start("killed") as child:
            deadline = time.monotonic() + 200
            trials = tmp_path / "killed/trials"
            before = sum(1 for _ in trials.glob("*/log.jsonl")) if trials.exists() else 0
            # Somewhere in a trial that this process has begun, or in the one after.
            while child.poll() is None and sum(1 for _ in trials.glob("*/log.jsonl")) <= before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1.5))
            child.send_signal(signal.SIGKILL)
            child.communicate()
        if child.returncode == 0:
            break
        killed += 1
        assert killed < 30
    assert killed >= 3
    for name in ("results.json", "results.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    records = [json.loads(line) for line in (tmp_path / "killed/sweep.jsonl").read_text().splitlines()]
    ended = Counter((one["point"], one["seed"]) for one in records if one["kind"] == "finished")
    assert len(ended) == 6
    assert set(ended.values()) == {1}
    for log in (tmp_path / "whole/trials").glob("*/log.jsonl"):
        assert log.read_bytes() == (tmp_path / "killed/trials" / log.parent.name / "log.jsonl").read_bytes()


# ---------------------------------------------------------------------------------------------------------- the command


def test_what_the_command_refuses(tmp_path: Path, capsys: Capture) -> None:
    rate = "optim.learning_rate=1e-5,1e-4"
    assert "--points is for --search random" in refusal(capsys, "sweep", rate, "--points", 3)
    assert "say how many points" in refusal(capsys, "sweep", rate, "--search", "random")
    assert "at most 100000" in refusal(capsys, "sweep", rate, "--search", "random", "--points", 10**9)
    assert "did you mean" in refusal(capsys, "sweep", "optim.learning_rat=1,2")
    assert "nothing varies" in refusal(capsys, "sweep", "optim.learning_rate=1e-5")
    metric = refusal(capsys, "sweep", rate, "eval.metric=bleu", "--out", tmp_path / "out")
    assert "eval.metric='bleu': the task has accuracy" in metric
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- Optuna


def test_tpe_goes_where_it_was_good_and_is_a_function_of_the_ledger() -> None:
    pytest.importorskip("optuna")
    from jaxft.training.sweep.tpe import make_optuna

    space = parse_space(["optim.learning_rate=1e-5..1e-1:log", "optim.name=adamw,lion"], "classification")
    adviser = make_optuna(space, 0, "--search tpe", 40)
    points: dict[int, dict[str, str]] = {}
    finished: list[Finished] = []
    for number in range(40):
        point = dict(adviser.point(number, finished, points, "max"))
        assert point == adviser.point(number, finished, points, "max")
        points[number] = point
        value = -abs(math.log10(float(point["optim.learning_rate"])) + 3) - (point["optim.name"] == "lion")
        finished.append(result(number, 0, value))
    late = [abs(math.log10(float(points[number]["optim.learning_rate"])) + 3) for number in range(20, 40)]
    assert sorted(late)[10] < 0.5  # a random search: 1
    assert sum(points[number]["optim.name"] == "adamw" for number in range(20, 40)) > 12
    assert not adviser.hopeful(40, ((3, -9.0),), finished, points, "max")
    assert adviser.hopeful(40, ((3, 9.0),), finished, points, "max")


def test_without_optuna_the_command_says_what_to_install(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    said = refusal(capsys, "sweep", "optim.learning_rate=1e-5..1e-3:log", "--search", "tpe", "--points", 3)
    assert said == "--search tpe needs the package optuna: pip install 'jaxft[sweep]'"
