"""Models of images against `transformers` on torch, in process, in float32: values, gradients, positions of other sizes; and what training
drops, meshes, bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kinds import IMAGES, family_of, tiny_config
from reference import close, compare_images, drawn, make_reference, ours_of, torch_pixels

import jaxft
from jaxft import models
from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.hub.source import make_config
from jaxft.layers import Compute
from jaxft.layers.functions import ALWAYS, drop_rows
from jaxft.models.example import example_batch
from jaxft.models.grids import Grid
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.parallel.sharding import DEFAULT_RULES, make_mesh, shardings_of
from jaxft.trees import paths_of

torch = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")

SQUARE = {"image_size": [16, 17, 23, 8], "patch_size": [4, 3, 8]}
ANY = {"image_size": [16, (18, 25), (8, 21), 23], "patch_size": [4, 3, (2, 4), 8]}
SHARED: dict[str, list[Any]] = {
    "hidden_size": [32, 48],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 4],
    "hidden_act": ["gelu", "relu", "gelu_new", "silu"],
    "layer_norm_eps": [1e-12, 1e-3],
    "num_channels": [3, 1, 4],
    "qkv_bias": [True, False],
    "num_labels": [2, 5, 3],
}
POOLED = {
    "intermediate_size": [64, 24],
    "pooler_output_size": [None, 20],
    "pooler_act": ["tanh", "relu"],
    "pooler": [True],
}
OF_DINO = {"mlp_ratio": [2, 3], "use_swiglu_ffn": [True, False], "layerscale_value": [1.0, 0.1]}
VALUES: dict[str, dict[str, list[Any]]] = {
    "vit": {**SHARED, **ANY, **POOLED},
    "deit": {**SHARED, **ANY, **POOLED},
    "dinov2": {**SHARED, **SQUARE, **OF_DINO, "use_mask_token": [True, False]},
    "dinov2_with_registers": {**SHARED, **SQUARE, **OF_DINO, "num_register_tokens": [4, 1]},
}
CASES = [(kind, head) for kind in VALUES for head in models.family(kind).HEADS]


def still(kind: str, **changes: Any) -> Any:
    """The tiny Config of a kind, nothing of which is dropped."""
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), 0.0)
    return dataclasses.replace(tiny_config(kind), **off, **changes)


def test_all_are_held_against_the_reference() -> None:
    assert set(VALUES) == set(IMAGES)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_values_and_gradients_equal_the_reference(kind: str, head: str | None, tmp_path: Path) -> None:
    compare_images(models.family(kind), still(kind, num_hidden_layers=2, num_labels=5), head, kind, tmp_path)


@pytest.mark.sampled(80)
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("kind", VALUES)
def test_random_configs_equal_the_reference(kind: str, number: int, tmp_path: Path) -> None:
    config, heads = drawn(still(kind), VALUES[kind], number), list(models.family(kind).HEADS)
    compare_images(models.family(kind), config, heads[number % len(heads)], kind, tmp_path)


# ---------------------------------------------------------------------------------------------------- other resolutions

# Rows and columns of patches, from and to. The reference takes every stored grid for a square.
SIZES = [
    *((14, (24, 24)), (16, (37, 37)), (37, (16, 16)), (14, (7, 7)), (7, (32, 32)), (24, (14, 14)), (4, (5, 5))),
    *((5, (4, 4)), (1, (5, 5)), (3, (64, 64)), (64, (3, 3)), (2, (3, 3)), (14, (16, 16)), (16, (14, 14))),
    *((4, (2, 8)), (4, (8, 2)), (14, (14, 28)), (14, (10, 21)), (37, (20, 40)), (6, (1, 9))),
]


@pytest.mark.parametrize("kind", VALUES)
def test_resampled_positions_are_the_references(kind: str) -> None:
    assert len(SIZES) == 20
    for stored, (rows, columns) in SIZES:
        config = still(kind, image_size=4 * stored, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
        theirs = make_reference(models.family(kind), config, None, kind).embeddings
        table, was = theirs.position_embeddings.detach(), config.positions
        grid = Grid(rows, columns, was.alone, was.antialiased)
        with torch.no_grad():
            wanted = theirs.interpolate_pos_encoding(torch.zeros(1, grid.places, 8), 4 * rows, 4 * columns)
        ours = grid.resampled(table.numpy(), was)
        assert ours.shape == (1, grid.places, 8)
        np.testing.assert_allclose(ours, wanted.numpy(), rtol=0, atol=1e-5, err_msg=f"{stored} to {rows} x {columns}")


def at_other_size(kind: str, theirs: Any, pixels: Any) -> Any:
    """What the reference gives of images of another size than its own."""
    more = {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True}  # which always does
    with torch.no_grad():
        return theirs(pixels, **more)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("vit", 27),
        pytest.param("vit", (12, 24), marks=pytest.mark.slow),
        pytest.param("deit", (20, 16), marks=pytest.mark.slow),
        pytest.param("dinov2", 24, marks=pytest.mark.slow),
        ("dinov2_with_registers", 12),
    ],
)
def test_a_model_of_another_size_is_the_reference_of_it(kind: str, size: Any, tmp_path: Path) -> None:
    module, config = models.family(kind), still(kind, num_labels=3)
    theirs = make_reference(module, config, "image_classification", kind)
    theirs.save_pretrained(tmp_path / "theirs")
    notes: list[str] = []
    loaded = jaxft.load(tmp_path / "theirs", image_size=size, note=notes.append)
    grid = loaded.model.config.positions
    name = f"{module.hf_layout(config, 'image_classification').prefix}embeddings.position_embeddings"
    assert f"{name} is resampled from 4 x 4 to {grid} places" in notes
    batch = example_batch(loaded.model.facts, 3)
    ours = jax.jit(loaded.model.apply)({"params": loaded.params}, **batch)
    close(ours.logits, at_other_size(kind, theirs, torch_pixels(batch)).logits, "logits")
    # What is written is of that size, for both.
    loaded.save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/config.json").read_text())["image_size"]
    assert written == (list(size) if isinstance(size, tuple) else size)
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        close(ours.logits, again(torch_pixels(batch)).logits, "logits of what was written")
    notes.clear()
    back = jaxft.load(tmp_path / "ours", note=notes.append)
    jax.tree.map(np.testing.assert_array_equal, back.params, loaded.params)
    assert not [note for note in notes if "resampled" in note]


def test_what_does_not_follow_from_the_weights_is_refused_at_another_size_too(tmp_path: Path) -> None:
    theirs = make_reference(models.family("vit"), still("vit"), None, "vit")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"the weights contradict patch_size=8 \(there: 4\); leave it out"):
        jaxft.load(tmp_path, image_size=32, patch_size=8, note=lambda _: None)
    # As many patches as there are, all of them where they were: nothing is resampled.
    notes: list[str] = []
    jaxft.load(tmp_path, image_size=19, note=notes.append)
    assert not [note for note in notes if "resampled" in note]


def test_tables_of_half_precision_are_resampled_in_full(tmp_path: Path) -> None:
    theirs = make_reference(models.family("vit"), still("vit"), None, "vit").bfloat16()
    theirs.save_pretrained(tmp_path)
    loaded = jaxft.load(tmp_path, image_size=28, note=lambda _: None)
    table = theirs.embeddings.position_embeddings.detach().float().numpy()
    wanted = Grid(7, 7, 1).resampled(table, Grid(4, 4, 1))
    np.testing.assert_array_equal(loaded.params["embed"]["position_table"], wanted)
    assert loaded.params["embed"]["position_table"].dtype == np.float32


# ------------------------------------------------------------------------------------------------------ stochastic depth


def test_rows_are_dropped_whole_as_often_as_asked_and_scaled_by_the_rest() -> None:
    x = jnp.ones((40_000, 2, 3))
    for rate in (0.0, 0.3, 0.9):
        kept = jnp.uint32(round((1 - rate) * ALWAYS))
        out = np.asarray(drop_rows(x, kept, jax.random.key(5)))
        rows = out.reshape(len(out), -1)
        assert (rows == rows[:, :1]).all()
        assert set(np.unique(rows)) <= {np.float32(0.0), np.float32(ALWAYS / int(kept))}
        assert (rows[:, 0] > 0).mean() == pytest.approx(1 - rate, abs=0.01)


def test_the_rate_rises_with_depth() -> None:
    rates = 1 - still("vit", num_hidden_layers=5).kept() / ALWAYS
    assert rates.tolist() == [0.0] * 5
    config = dataclasses.replace(still("vit", num_hidden_layers=5), drop_path_rate=0.4)
    np.testing.assert_allclose(1 - config.kept() / ALWAYS, [0.0, 0.1, 0.2, 0.3, 0.4], atol=1e-5)
    alone = dataclasses.replace(still("vit", num_hidden_layers=1), drop_path_rate=0.4)
    assert alone.kept().tolist() == [ALWAYS]


@pytest.mark.slow
def test_layers_are_skipped_by_images_and_nothing_else_changes() -> None:
    # The last layer alone drops, so an image either has what both of its parts add, or lacks one of them, or both.
    config = dataclasses.replace(still("vit", num_hidden_layers=2), drop_path_rate=0.5)
    model: Any = models.family("vit").Model(config, None, Compute())
    params, batch = init_params(model, 0), example_batch(model.facts, 64)
    run = jax.jit(
        lambda batch, key: model.apply({"params": params}, **batch, key=key, hidden_states=True).hidden_states
    )
    states = [np.asarray(run(batch, jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(states[0], states[1])
    assert (states[0] != states[2]).any()
    np.testing.assert_array_equal(states[0][1], states[2][1])  # the first layer is always there
    skipped = (states[0][2] == states[0][1]).all(axis=(1, 2))
    assert 4 < skipped.sum() < 32  # a quarter of 64
    whole = model.apply({"params": params}, **batch, hidden_states=True).hidden_states[2]
    assert not (np.asarray(whole) == states[0][1]).all(axis=(1, 2)).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(name, marks=[pytest.mark.slow] * (name != "vit")) for name in VALUES])
def test_layers_drop_the_same_unrolled_and_scanned(kind: str) -> None:
    config = dataclasses.replace(tiny_config(kind), drop_path_rate=0.5, num_hidden_layers=2)
    found = []
    for compute in (Compute(), Compute(layers="scanned")):
        model: Any = models.family(kind).Model(config, "image_classification", compute)
        params, batch = init_params(model, 0), example_batch(model.facts, 8)

        def loss(p: Any, model: Any = model, batch: Any = batch) -> Any:
            return jnp.square(model.apply({"params": p}, **batch, key=jax.random.key(3)).logits).sum()

        found.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


# ---------------------------------------------------------------------------------------------------------------- meshes

MESHES = {
    "2x2x2": MeshConfig(2, 2, 2),
    "data8": MeshConfig(8, 1, 1),
    "fsdp8": MeshConfig(1, 8, 1),
    "fsdp4_tensor2": MeshConfig(1, 4, 2),
    "context4": MeshConfig(2, 1, 1, context=4),
    "fsdp2_context2_tensor2": MeshConfig(1, 2, 2, context=2),
}


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        pytest.param(kind, mesh, marks=[pytest.mark.slow] * ((kind, mesh) != ("vit", "2x2x2")))
        for kind in VALUES
        for mesh in MESHES
    ],
)
def test_every_mesh_gives_what_one_device_gives(kind: str, mesh: str) -> None:
    config = dataclasses.replace(tiny_config(kind), num_hidden_layers=2)
    if (
        MESHES[mesh].context > 1
    ):  # rows are filled up to be split, and what is dropped of each token depends on how many there are
        config = dataclasses.replace(still(kind, num_hidden_layers=2), drop_path_rate=0.4)
    model: Any = models.family(kind).Model(config, "image_classification", Compute(layers="scanned"))
    params, batch = init_params(model, 0), example_batch(model.facts, 8)

    def loss(p: Any, batch: Any) -> Any:
        return jnp.square(model.apply({"params": p}, **batch, key=jax.random.key(1)).logits).sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    made = make_mesh(MESHES[mesh])
    with jax.set_mesh(made):
        placed = jax.device_put(params, shardings_of(made, DEFAULT_RULES, *shapes_and_axes(model)))
        other, found = jax.jit(jax.value_and_grad(loss))(placed, batch)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    worst = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * worst), gradient, found)


# ------------------------------------------------------------------------------------------------------------- bad input


def test_images_that_are_not_the_models_are_refused_in_one_line() -> None:
    model: Any = models.family("vit").Model(still("vit"), None, Compute())
    params, pixels = init_params(model, 0), np.zeros((2, 16, 16, 3), np.float32)
    wrong = {
        r"pixels are 2 x 16 x 20 x 3, this model reads B x 16 x 16 x 3 \(batch, height, width, channels\): resize": (
            np.zeros((2, 16, 20, 3), np.float32)
        ),
        "pixels are 2 x 3 x 16 x 16, ": np.zeros((2, 3, 16, 16), np.float32),
        "pixels are 16 x 16 x 3, ": pixels[0],
        "pixels are uint8: floating-point numbers are wanted": pixels.astype(np.uint8),
    }
    for said, given in wrong.items():
        with pytest.raises(UserError, match=said) as caught:
            model.apply({"params": params}, given)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) <= 300
    with pytest.raises(UserError, match=r"takes no pixel_values=: it is called pixels= here"):
        model.apply({"params": params}, pixels=pixels, pixel_values=pixels)
    with pytest.raises(UserError, match=r"takes no interpolate_pos_encoding="):
        model.apply({"params": params}, pixels, interpolate_pos_encoding=True)


@pytest.mark.parametrize(
    ("kind", "arch", "said"),
    [
        ("vit", {"image_size": 3}, "image_size=3 is smaller than a patch (patch_size=4)"),
        ("vit", {"image_size": [16, 0]}, "image_size=(16, 0): sides must be at least 1"),
        ("vit", {"image_size": 1 << 30}, "must be at most 16777216"),
        ("vit", {"image_size": [1, 2, 3]}, "model.arch.image_size="),
        ("vit", {"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=4"),
        ("vit", {"drop_path_rate": 1.0}, "drop_path_rate=1.0 must lie in 0..1"),
        ("deit", {"pooler_act": "cube"}, "model.arch.pooler_act='cube'"),
        ("deit", {"pooler_output_size": 0}, "pooler_output_size=0 must be at least 1"),
        ("vit", {"num_channels": 0}, "num_channels=0 must be at least 1"),
        ("dinov2", {"image_size": [16, 20]}, "this family's grids of patches are square"),
        ("dinov2", {"mlp_ratio": 0}, "mlp_ratio=0 must be at least 1"),
        ("dinov2", {"model_type": "dinov3_vit"}, "model.arch.model_type="),
        (
            "dinov2",
            {"model_type": "dinov2_with_registers", "use_mask_token": False},
            "use_mask_token=false is not possible with register tokens",
        ),
    ],
)
def test_configs_that_no_model_can_have_are_refused(kind: str, arch: dict[str, Any], said: str) -> None:
    module = models.family(kind)
    tiny = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(UserError) as caught:
        make_config(module, tiny | arch)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shapes_of_a_model_of_huge_images_take_no_memory(tmp_path: Path) -> None:
    model: Any = models.family("vit").Model(still("vit", image_size=1 << 20, patch_size=1 << 10), None)
    shapes, _ = shapes_and_axes(model)
    assert paths_of(shapes)["embed/position_table"].shape == (1, 1 + (1 << 20), 32)
    made = make_reference(models.family("vit"), still("vit"), None, "vit")
    made.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text()) | {"image_size": 1 << 20}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(UserError, match=r"mis-shaped: embeddings.position_embeddings is \[1, 17, 32\], expected \[1, "):
        jaxft.load(tmp_path, note=lambda _: None)


def test_kinds_of_dinov2_have_their_own_defaults_and_keys() -> None:
    module = models.family("dinov2")
    assert make_config(module, module.config_from_hf({"model_type": "dinov2"})).patch_size == 14
    config = make_config(module, module.config_from_hf({"model_type": "dinov2_with_registers"}))
    assert (config.patch_size, config.registers, config.tokens) == (16, 4, 201)
    assert "use_mask_token" not in module.config_to_hf(config)
    assert family_of("dinov2_with_registers") == "dinov2"


def test_a_bare_model_without_its_pooler_is_read_as_one(tmp_path: Path) -> None:
    module, config = models.family("vit"), still("vit", pooler=False)
    theirs = type(make_reference(module, config, None, "vit"))
    theirs = theirs(theirs.config_class(**module.config_to_hf(config)), add_pooling_layer=False)
    model, _ = ours_of(module, theirs, config, None, tmp_path)
    assert model.config == config
    loaded = jaxft.load(tmp_path, note=lambda _: None)
    assert not loaded.model.config.pooler
    assert loaded.model.apply({"params": loaded.params}, **example_batch(model.facts, 2)).pooled is None


# ------------------------------------------------------------------------------------------------------- as the hub has it

_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "qkv_bias": True,
}
_PLAIN = _BASE | {"intermediate_size": 3072, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12}
_DINO = _BASE | {"mlp_ratio": 4, "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
_DINO |= {"layerscale_value": 1.0, "drop_path_rate": 0.0, "out_features": ["stage12"], "reshape_hidden_states": True}
_GIANT = {"hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 40, "use_swiglu_ffn": True}
PUBLISHED: dict[tuple[str, str | None], dict[str, Any]] = {
    ("ViTForImageClassification", "image_classification"): _PLAIN | {"model_type": "vit"},
    ("ViTModel", None): _PLAIN | {"model_type": "vit"},
    ("DeiTForImageClassificationWithTeacher", "distilled_classification"): _PLAIN | {"model_type": "deit"},
    ("Dinov2Model", None): _DINO | {"model_type": "dinov2"},
    ("Dinov2ForImageClassification", "image_classification"): _DINO | _GIANT | {"model_type": "dinov2"},
    ("Dinov2WithRegistersModel", None): _DINO | {"model_type": "dinov2_with_registers", "num_register_tokens": 4},
}


@pytest.mark.parametrize(("name", "head"), PUBLISHED)
def test_published_sizes_have_the_references_parameters(name: str, head: str | None) -> None:
    stated = PUBLISHED[name, head]
    module, kind = models.family(stated["model_type"]), getattr(transformers, name)
    tree = module.config_from_hf(stated) | {"num_labels": 1000}
    model: Any = module.Model(make_config(module, tree), head)
    ours = sum(leaf.size for leaf in jax.tree.leaves(shapes_and_axes(model)[0]))
    settings = {key: value for key, value in stated.items() if key not in ("model_type", "out_features")}
    with torch.device("meta"):
        theirs = kind(kind.config_class(num_labels=1000, **settings))
    assert ours == sum(parameter.numel() for parameter in theirs.parameters())
    assert ours > 80e6


def test_a_model_of_masked_images_is_read_without_its_decoder(tmp_path: Path) -> None:
    made = transformers.ViTForMaskedImageModeling
    made(made.config_class(**models.family("vit").config_to_hf(still("vit")), encoder_stride=4)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        UserError, match="ViTForMaskedImageModeling is not supported: vit here has the heads image_class"
    ):
        jaxft.load(tmp_path, note=lambda _: None)
    notes: list[str] = []
    loaded = jaxft.load(tmp_path, head="image_classification", note=notes.append)
    assert "initialised afresh: head/linear/kernel, head/linear/bias" in notes
    assert any("embeddings.mask_token" in note and note.startswith("in the checkpoint, not used: ") for note in notes)
    assert loaded.model.config.num_labels == 2
