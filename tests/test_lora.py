"""Low-rank adapters: what trains, that gradients are right, the same course on a mesh, and merged weights that leave."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import refusal, run
from tiny_run import overrides

from jaxft import models
from jaxft.config import LoraConfig, load_config
from jaxft.errors import UserError
from jaxft.hub.peft import not_storable, write_adapter
from jaxft.hub.pretrained import export_folder
from jaxft.layers import Compute
from jaxft.models import adapters
from jaxft.models.example import example_batch
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.training.loop import fit
from jaxft.training.programs import compile_programs
from jaxft.training.setup import Times, prepare
from jaxft.trees import branch, map_paths, paths_of

ALL = LoraConfig(rank=3, alpha=6.0, targets=("layers/*",))


# ModernBERT's adapters are held where they are stored.
FAMILIES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in ("bert", "llama", "roberta")))
    for name in models.families()
]


def model_of(family: str) -> Any:
    config = dataclasses.replace(models.family(family).TINY, num_hidden_layers=2)
    return models.family(family).Model(config, None, Compute(layers="scanned"))


def read_by(model: Any) -> dict[str, Any]:
    """What a model reads and nothing else."""
    reads = model.facts.reads
    given = jnp.arange(12).reshape(2, 6) if reads == "tokens" else example_batch(model.facts, 2)[reads]
    return {reads: given}


def filled(tree: Any) -> Any:
    """Random numbers everywhere, zeros of B included."""
    return map_paths(
        lambda path, leaf: np.random.default_rng(len(path)).normal(size=leaf.shape).astype(np.float32) * 0.1, tree
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing(family: str) -> None:
    model = adapters.adapted(model_of(family), ALL)
    assert isinstance(model, adapters.Adapted)
    params = init_params(model, 0)
    batch = read_by(model)
    ours = model.apply({"params": params}, **batch).hidden
    np.testing.assert_array_equal(ours, model.base.apply({"params": branch(params, "base")}, **batch).hidden)
    thin = paths_of(params["lora"])
    assert all(np.any(np.asarray(leaf) != 0) == path.endswith("/a") for path, leaf in thin.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_and_gradients_follow_the_formula(family: str) -> None:
    model = adapters.adapted(model_of(family), ALL)
    assert isinstance(model, adapters.Adapted)
    params = filled(shapes_and_axes(model)[0])
    batch = read_by(model)

    def loss(params: Any) -> jax.Array:
        return (model.apply({"params": params}, **batch).hidden ** 2).sum()

    def loss_of_merged(base: Any) -> jax.Array:
        return (model.base.apply({"params": base}, **batch).hidden ** 2).sum()

    merged = adapters.merged(params, model.alpha)
    gradient, of_merged = jax.jit(jax.grad(loss))(params), jax.jit(jax.grad(loss_of_merged))(merged)
    base, made, slopes = (paths_of(tree) for tree in (params["base"], merged, of_merged))
    thin, found = paths_of(params["lora"]), paths_of(gradient["lora"])
    scale = 6.0 / 3
    for path in base:
        if path not in model.targets:
            np.testing.assert_array_equal(base[path], made[path])
            continue
        a, b = thin[f"{path}/a"], thin[f"{path}/b"]
        for layer in range(2):
            left, right = a[layer].reshape(-1, 3), b[layer].reshape(3, -1)
            wanted = base[path][layer] + scale * (left @ right).reshape(base[path].shape[1:])
            np.testing.assert_allclose(made[path][layer], wanted, rtol=1e-5, atol=1e-6, err_msg=path)
            slope = np.asarray(slopes[path][layer]).reshape(left.shape[0], right.shape[1])
            of_a, of_b = found[f"{path}/a"][layer], found[f"{path}/b"][layer]
            np.testing.assert_allclose(of_a.reshape(left.shape), scale * slope @ right.T, rtol=1e-4, atol=1e-3)
            np.testing.assert_allclose(of_b.reshape(right.shape), scale * left.T @ slope, rtol=1e-4, atol=1e-3)


def trained(folder: Path, out: str, *more: str) -> tuple[Any, Any]:
    settings = ("train.steps=6", "eval.every=6", "optim.eps=1e-3", "optim.ema=null", "train.accumulation=2")
    mesh = ("mesh.data=1",) if out == "one" else ()
    config = load_config(
        None, overrides(folder, f"train.out={folder / out}", "model.lora.rank=2", *settings, *mesh, *more)
    )
    if out == "one":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "devices", lambda *_: [jax.local_devices()[0]])
            ready = prepare(config, lambda _: None, Times())
    else:
        ready = prepare(config, lambda _: None, Times())
    programs = compile_programs(ready, lambda _: None)
    start = jax.device_get(ready.start_params(0, lambda _: None))
    result = fit(ready, programs, folder / out, 0, lambda _: None, Times())
    return start, jax.device_get(result.params)


@pytest.mark.slow
def test_only_adapters_and_head_train_and_the_mesh_does_not_matter(tmp_path: Path) -> None:
    start, one = trained(tmp_path, "one")
    before, after = paths_of(start), paths_of(one)
    for path in before:
        moved = not np.array_equal(before[path], after[path])
        assert moved == path.startswith(("lora/", "base/head/")), path
    # Two ways of accumulation, four of fsdp, two of tensor parallelism: dropout bits of micro-batches are their own.
    _, many = trained(tmp_path, "many", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2")
    found = paths_of(many)
    for path, leaf in after.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)


def test_frozen_weights_have_no_moments(tmp_path: Path) -> None:
    config = load_config(None, overrides(tmp_path, "model.lora.rank=2", "optim.ema=null"))
    ready = prepare(config, lambda _: None, Times())
    moments = sum(leaf.size for leaf in jax.tree.leaves(ready.state.opt_state))
    trains = sum(
        leaf.size
        for leaf, stays in zip(jax.tree.leaves(ready.shapes), jax.tree.leaves(ready.frozen), strict=True)
        if not stays
    )
    assert trains < 0.4 * sum(leaf.size for leaf in jax.tree.leaves(ready.shapes))
    assert 2 * trains <= moments <= 2 * trains + 4


def test_the_merged_model_leaves_and_the_checkpoint_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code, text, err = run(
        capsys,
        "train",
        *overrides(
            tmp_path, f"train.out={out}", "model.lora.rank=2", "model.lora.targets=['layers/*']", "train.steps=10"
        ),
    )
    assert code == 0, err
    assert "loaded back: parameters bit-equal, held-out metrics identical" in text
    assert "no adapters are exported: without model.init" in text
    assert not (out / "adapter").exists()
    metrics = json.loads((out / "metrics.json").read_text())
    for source in (out / "export", out):
        if source == out:
            (out / "export").rename(tmp_path / "away")  # so that the checkpoint is what is read
        code, text, err = run(
            capsys, "eval", source, f"data.eval={tmp_path / 'eval.csv'}", "--out", tmp_path / "scores"
        )
        assert code == 0, err
        scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
        assert scores["accuracy"] == metrics["accuracy"]
        np.testing.assert_allclose(scores["loss"], metrics["loss"], rtol=1e-5)
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "away")
    names = {name for name, _ in theirs.named_parameters()}
    assert not any("lora" in name for name in names)
    assert torch.isfinite(theirs(torch.tensor([[2, 5, 6, 3]])).logits).all()


def test_a_run_from_a_model_leaves_its_adapters_beside_the_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, out = tmp_path / "start", tmp_path / "out"
    kind = models.family("bert")
    sizes = {
        "vocab_size": 48,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = dataclasses.replace(kind.TINY, **sizes, max_position_embeddings=32)
    base: Any = kind.Model(config, None, Compute())
    overrides(tmp_path)  # writes the tokenizer
    params = filled(shapes_and_axes(base)[0])
    export_folder(start / "export", {}, kind, base, params, tokenizer_folder=str(tmp_path / "tokenizer"))
    settings = (f"model.init={start / 'export'}", "model.arch={}", "model.lora.rank=2", "train.steps=4")
    code, text, err = run(capsys, "train", *overrides(tmp_path, f"train.out={out}", *settings))
    assert code == 0, err
    assert f"exported {out / 'adapter'} (adapters alone, for peft)" in text
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (2, str(start / "export"))
    before, merged = (load_file(folder / "export/model.safetensors") for folder in (start, out))
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    name = "encoder.layer.0.attention.self.query"
    a, b = (adapter[f"base_model.model.bert.{name}.lora_{letter}.weight"] for letter in "AB")
    moved = merged[f"bert.{name}.weight"] - before[f"{name}.weight"]
    assert np.abs(moved).max() > 0
    np.testing.assert_allclose(config["lora_alpha"] / 2 * b @ a, moved, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.lora.targets=['layers/atention/*']"], "model.lora.targets: 'layers/atention/*' matches no kernel"),
        (["model.lora.targets=['embed/*']"], "model.lora.targets: 'embed/*' matches no kernel; there are: layers/"),
        (["model.lora.train=['had/*']"], "model.lora.train: 'had/*' matches no parameter"),
        (["optim.freeze=['embed/*']"], "adapters say what trains: leave out optim.freeze"),
        (["model.lora.rank=0"], "model.lora.rank=0: must be at least 1"),
    ],
)
def test_what_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str) -> None:
    assert message in refusal(capsys, "train", *overrides(tmp_path, "model.lora.rank=2", *changes))


def test_patterns_are_checked_without_a_run() -> None:
    with pytest.raises(UserError, match="matches no kernel"):
        adapters.adapted(model_of("bert"), dataclasses.replace(ALL, targets=("layers/attention/query/bias",)))
    assert adapters.adapted(model_of("bert"), LoraConfig()) == model_of("bert")


HEAD = {"bert": "classification", "llama": "causal_lm", "modernbert": "classification"}
LABELLED = ("bert", "modernbert")


def exported(family: str, folder: Path, targets: str = "layers/*") -> None:
    """An adapted model with all numbers filled: its base, its adapter and the merged model, in folders."""
    kind = models.family(family)
    config = dataclasses.replace(kind.TINY, num_hidden_layers=2)
    model = adapters.adapted(kind.Model(config, HEAD[family], Compute()), dataclasses.replace(ALL, targets=(targets,)))
    assert isinstance(model, adapters.Adapted)
    params = filled(shapes_and_axes(model)[0])
    trained = tuple(path for path in paths_of(params["base"]) if path.startswith("head/") and family in LABELLED)
    merged = adapters.merged(params, model.alpha)
    # A classifier that was trained is not the base's.
    start = map_paths(lambda path, leaf: 0 * leaf if path in trained else leaf, params["base"])
    for name, tree in (("base", start), ("merged", merged)):
        export_folder(folder / name, {}, kind, model.base, tree, tokenizer_folder=None)
    write_adapter(folder / "adapter", kind, model, params, trained, str(folder / "base"))


CASES = [("bert", "layers/*"), ("bert", "*/mlp/down/*"), ("llama", "layers/*"), ("modernbert", "layers/*")]
CASES += [("modernbert", "*/query/*"), ("modernbert", "layers/[am]*/[uv]*/*")]


# BERT's mlp/down is output.dense, and so ends attention.output.dense.
@pytest.mark.parametrize(("family", "targets"), CASES)
def test_stored_adapters_make_the_merged_model_of_the_base(family: str, targets: str, tmp_path: Path) -> None:
    exported(family, tmp_path, targets)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    adapter, base, merged = (
        load_file(tmp_path / name)
        for name in ("adapter/adapter_model.safetensors", "base/model.safetensors", "merged/model.safetensors")
    )
    used: set[str] = set()
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapter:
            pair = [f"{module}.lora_{letter}.weight" for letter in "BA"]
            used |= set(pair)
            end = next((end for end in settings.get("rank_pattern", {}) if module.endswith(f".{end}")), None)
            rank = settings["rank_pattern"][end] if end else settings["r"]
            alpha = settings["alpha_pattern"][end] if end else settings["lora_alpha"]
            assert rank == adapter[pair[0]].shape[1]
            weight = weight + alpha / rank * adapter[pair[0]] @ adapter[pair[1]]
        elif f"base_model.model.{name}" in adapter:
            used.add(f"base_model.model.{name}")
            weight = adapter[f"base_model.model.{name}"]
        np.testing.assert_allclose(weight, merged[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert used == set(adapter)
    # peft adapts every module whose name ends in one of these: no other may.
    named = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    ends = {name for name in named for end in settings["target_modules"] if name == end or name.endswith(f".{end}")}
    assert ends == {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter if ".lora_" in name
    }
    heads = {"bert": ["classifier"], "llama": None, "modernbert": ["classifier", "head.dense", "head.norm"]}
    assert settings["modules_to_save"] == heads[family]


def test_part_of_a_fused_tensor_that_is_trained_is_said() -> None:
    kind = models.family("modernbert")
    model = adapters.adapted(kind.Model(kind.TINY, None, Compute()), ALL)
    assert isinstance(model, adapters.Adapted)
    q, k, v = (f"layers/attention/{name}/kernel" for name in ("query", "key", "value"))
    assert not_storable(kind, model, (q, k, v, "norm/scale")) is None
    said = not_storable(kind, model, (k,))
    assert said == f"{k} was trained, and is one tensor with {q}, {v} there (model.layers.{{layer}}.attn.Wqkv.weight)"


@pytest.mark.parametrize("family", HEAD)
def test_peft_loads_them(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    import transformers

    exported(family, tmp_path)
    auto = "AutoModelForCausalLM" if family == "llama" else "AutoModelForSequenceClassification"
    load = getattr(transformers, auto).from_pretrained
    wanted = load(tmp_path / "merged").eval()
    found = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    tokens = torch.arange(12).reshape(2, 6) + 1
    with torch.no_grad():
        np.testing.assert_allclose(found(tokens).logits, wanted(tokens).logits, rtol=1e-4, atol=1e-4)
