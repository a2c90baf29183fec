"""Last layers drawn afresh: which, as what, by which seed, and when not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kinds import tiny_config
from tiny import make_folder, rows, write_csv

from jaxft import models
from jaxft.config import load_config
from jaxft.config.schema import MeshConfig
from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.models.reinit import redrawn, redrawn_rows
from jaxft.parallel.sharding import DEFAULT_RULES, make_mesh, shardings_of
from jaxft.training.setup import Setup, Times, prepare
from jaxft.trees import leaves_of, paths_of

SHARED, QUICK = ("albert",), ("modernbert",)  # whose first layer lacks a parameter
FAMILIES = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
    for name in models.families()
    if name not in SHARED
]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_the_last_layers_are_those_that_it_would_begin_with(family: str) -> None:
    module: Any = models.family(family)
    head = next((name for name, one in module.HEADS.items() if one.pooled), None)
    model = module.Model(tiny_config(family), head, Compute(layers="scanned"))
    layers = model.facts.stacks[0].layers
    shapes, axes = shapes_and_axes(model)
    mesh = make_mesh(MeshConfig(1, 2, 2), jax.devices()[:4])
    places = shardings_of(mesh, DEFAULT_RULES, shapes, axes)
    loaded = jax.tree.map(lambda leaf, place: jax.device_put(np.full(leaf.shape, 7, leaf.dtype), place), shapes, places)
    found = redrawn(model, loaded, redrawn_rows(model, 1), 3, mesh)
    fresh, leaves = paths_of(init_params(model, 3)), leaves_of(shapes, axes)
    for path, leaf in paths_of(found).items():
        assert leaf.sharding == paths_of(places)[path]
        kept, drawn = np.asarray(leaf), np.asarray(fresh[path])
        if path.startswith("pooler/"):
            np.testing.assert_array_equal(kept, drawn)
        elif (count := leaves[path].layers) is None:
            assert (kept == 7).all(), path
        else:
            np.testing.assert_array_equal(kept[-1:], drawn[-1:], err_msg=path)
            assert (kept[:-1] == 7).all(), path
            assert len(kept) == count
    everything = redrawn_rows(model, layers)
    assert {path for path in leaves if path.startswith("layers/")} <= everything.keys()
    with pytest.raises(UserError, match=f"the model has {layers} layers"):
        redrawn_rows(model, layers + 1)


def test_shared_layers_are_refused() -> None:
    module: Any = models.family("albert")
    with pytest.raises(UserError, match="the 4 layers of this model share the parameters of 2"):
        redrawn_rows(module.Model(tiny_config("albert"), None, Compute()), 1)


def made(tmp_path: Path, *more: str) -> Setup:
    source = tmp_path / "source"
    if not source.exists():
        make_folder(source, None)
        write_csv(tmp_path / "rows.csv", rows(24))
    settings = [f"model.init={source}", f"data.train={tmp_path / 'rows.csv'}", "data.max_length=16", "train.steps=2"]
    return prepare(load_config(None, [*settings, "train.batch_size=8", *more]), lambda _: None, Times())


def test_a_run_says_what_it_draws_and_another_seed_draws_others(tmp_path: Path) -> None:
    ready, notes = made(tmp_path, "model.reinit_layers=1"), list[str]()
    first, again, other = (paths_of(jax.device_get(ready.start_params(seed, notes.append))) for seed in (0, 0, 1))
    assert "drawn afresh (model.reinit_layers=1): layers 1..1 of 2 (layers), the pooler" in notes
    path = "layers/attention/query/kernel"
    as_stored = paths_of(jax.device_get(made(tmp_path).start_params(0, notes.append)))
    np.testing.assert_array_equal(first[path], again[path])
    np.testing.assert_array_equal(first[path][0], as_stored[path][0])
    for changed in (as_stored, other):
        assert not np.array_equal(first[path][1], changed[path][1])
        assert not np.array_equal(first["pooler/kernel"], changed["pooler/kernel"])
    for outside in (path for path in first if not path.startswith(("layers/", "pooler/", "head/"))):
        np.testing.assert_array_equal(first[outside], as_stored[outside])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["model.reinit_layers=-1"], "must not be negative"),
        (["model.reinit_layers=3"], "the model has 2 layers"),
        (["model.reinit_layers=1", "optim.freeze=[layers/1/*]"], "optim.freeze would leave layers/"),
        (["model.reinit_layers=1", "optim.freeze=[layers/*]"], "optim.freeze would leave layers/"),
        (["model.reinit_layers=1", "optim.freeze=[pooler/*]"], "optim.freeze would leave pooler/"),
        (["model.reinit_layers=1", "model.lora.rank=2"], "adapters, without it in model.lora.train"),
        (["model.reinit_layers=1", "model.init=null", "model.family=bert"], "without model.init all are"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, more: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        made(tmp_path, *more)
    assert "\n" not in str(caught.value)


def test_what_is_frozen_below_and_what_trains_beside_adapters_is_fine(tmp_path: Path) -> None:
    assert made(tmp_path, "model.reinit_layers=1", "optim.freeze=[layers/0/*, embed/*]").redrawn
    ready = made(
        tmp_path, "model.reinit_layers=1", "model.lora.rank=2", "model.lora.train=[layers/*, pooler/*, head/*]"
    )
    start, fresh = (
        paths_of(jax.device_get(tree)) for tree in (ready.start_params(0, lambda _: None), init_params(ready.model, 0))
    )
    path = "base/layers/attention/query/kernel"
    np.testing.assert_array_equal(start[path][1], fresh[path][1])
