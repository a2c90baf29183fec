"""Sweeps over dropout rates: one compiled step, whose trials give what runs of their own give."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import pytest
from tiny import make_folder
from tiny_run import config_of

from jaxft.config import ModelConfig, RunConfig, load_config, with_overrides
from jaxft.config.stored import RunMeta
from jaxft.errors import UserError
from jaxft.parallel.sharding import make_mesh
from jaxft.reporting.sinks import read_log
from jaxft.training import loop, recipe, setup
from jaxft.training.programs import compile_programs
from jaxft.training.sweep.engine import Sweep, run_sweep
from jaxft.training.sweep.space import parse_space
from jaxft.training.sweep.workbench import program_key, varied_rates

HIDDEN, ATTENTION = "model.arch.hidden_dropout_prob", "model.arch.attention_probs_dropout_prob"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    changes = ("eval.every=3", "train.log_every=1", "train.steps=3", "optim.schedule=constant", "optim.warmup_steps=0")
    return config_of(tmp_path_factory.mktemp("base"), *changes)


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "make_mesh", lambda mesh: make_mesh(mesh, jax.devices()[:1]))


def log_of_a_run(base: RunConfig, out: Path, *changes: str) -> bytes:
    config = with_overrides(base, changes)
    ready = setup.prepare(config, lambda line: None, setup.Times())
    programs = compile_programs(ready, lambda line: None)
    loop.fit(ready, programs, out, config.train.seed, lambda line: None, setup.Times())
    return (out / "log.jsonl").read_bytes()


@pytest.mark.slow  # rates of learning, and the same bits: test_sweep.py
def test_one_step_serves_all_rates_and_gives_the_bits_of_train(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[object] = []
    made = recipe.make_train_step
    monkeypatch.setattr(recipe, "make_train_step", lambda *a, **k: [traced.append(a), made(*a, **k)][1])
    initialised: list[object] = []
    drawn = setup.init_params
    monkeypatch.setattr(setup, "init_params", lambda *a: [initialised.append(a[0]), drawn(*a)][1])
    stored: dict[str, object] = {}
    meta = loop.run_meta

    def noted(ready: setup.Setup, out: Path, seed: int) -> RunMeta:
        made = meta(ready, out, seed)
        stored[out.name] = made["arch"]["hidden_dropout_prob"]
        return made

    monkeypatch.setattr(loop, "run_meta", noted)

    typed = (f"{HIDDEN}=0.0,0.3", f"{ATTENTION}=0.2,0.5", "optim.learning_rate=1e-3,1e-2")
    sweep = Sweep(base, parse_space(typed, "classification"), "grid", 0, None, False, tmp_path / "sweep")
    outcome = run_sweep(sweep, None, lambda line: None)
    assert (outcome.trials, outcome.compiled, outcome.groups) == (8, 1, 1)
    assert len(traced) == 2  # the ordinary step is built, not traced
    assert len(set(initialised)) == 1
    assert [stored[f"{number:04d}-seed0"] for number in range(8)] == [0.0] * 4 + [0.3] * 4

    trials = tmp_path / "sweep/trials"
    changes = (f"{HIDDEN}=0.3", f"{ATTENTION}=0.5", "optim.learning_rate=1e-2")
    wanted = log_of_a_run(base, tmp_path / "alone", *changes)
    assert (trials / "0007-seed0/log.jsonl").read_bytes() == wanted
    own = load_config(trials / "0007-seed0/config.yaml")
    assert (own.model.arch["hidden_dropout_prob"], own.model.arch["attention_probs_dropout_prob"]) == (0.3, 0.5)
    best = load_config(tmp_path / "sweep/best.yaml")
    assert {type(best.model.arch[key.split(".")[-1]]) for key in (HIDDEN, ATTENTION)} == {float}


@pytest.mark.slow
def test_a_trial_at_rate_0_is_a_run_without_dropout(base: RunConfig, tmp_path: Path) -> None:
    sweep = Sweep(base, parse_space([f"{HIDDEN}=0,0.3"], "classification"), "grid", 0, None, False, tmp_path / "sweep")
    assert run_sweep(sweep, None, lambda line: None).compiled == 1
    log_of_a_run(base, tmp_path / "alone", f"{HIDDEN}=0")
    found, wanted = (
        [one["loss"] for one in read_log(folder / "log.jsonl")]
        for folder in (tmp_path / "sweep/trials/0000-seed0", tmp_path / "alone")
    )
    assert found == pytest.approx(wanted, rel=1e-5)  # the same elements are kept; sums may come in another order


def test_what_changes_a_program(base: RunConfig) -> None:
    def with_rate(*changes: str) -> RunConfig:
        return with_overrides(base, changes)

    low, high, none = (with_rate(f"{HIDDEN}={rate}") for rate in ("0", "0.5", "null"))
    varied = varied_rates([low, high, none, with_rate(f"{ATTENTION}=0.3")])
    assert varied == {"hidden_dropout_prob"}  # the other one has one value: it stays a constant
    assert program_key(low, varied) == program_key(high, varied)
    assert len({program_key(one, varied) for one in (base, low, none)}) == 3
    assert program_key(low) != program_key(high)
    assert program_key(low, varied) != program_key(with_rate(f"{HIDDEN}=0", f"{ATTENTION}=0.3"), varied)


@pytest.mark.parametrize(
    ("rate", "said"), [("1.0", "must lie in 0..1"), ("-0.1", "must lie in 0..1"), ("0.9999999", "at most 0.99998")]
)
def test_rates_that_are_none_are_refused_before_anything_is_read(
    base: RunConfig, rate: str, said: str, tmp_path: Path
) -> None:
    of_folder = with_overrides(base, ["model.init=/nowhere", "model.family=null", "model.arch={}"])
    space = parse_space([f"{HIDDEN}=0.1,{rate}"], "classification")
    with pytest.raises(UserError, match=f"hidden_dropout_prob=.*{said}"):
        run_sweep(Sweep(of_folder, space, "grid", 0, None, False, tmp_path / "out"), None, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_what_no_model_can_be_is_refused_before_the_first_trial(base: RunConfig, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    of_folder = dataclasses.replace(base, model=ModelConfig(init=str(folder)))
    for typed, said in (
        ("model.arch.hidden_act=gelu,nope", "hidden_act='nope'"),
        (f"{HIDDEN}=0.1,null", "valid number"),
        ("model.arch.FIXED=1,2", "unknown config key"),
    ):
        sweep = Sweep(of_folder, parse_space([typed], "classification"), "grid", 0, None, False, tmp_path / "out")
        with pytest.raises(UserError, match=said):
            run_sweep(sweep, None, lambda line: None)
        assert not (tmp_path / "out/trials").exists()
