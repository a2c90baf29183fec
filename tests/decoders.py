"""What the tests of decoders share: random configs, the reference's next-token loss, its ``generate``, and folders that come back."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import close, compare_head, drawn, make_reference, ours_of, torch_inputs

from jaxft import models
from jaxft.hub.convert import export_tensors
from jaxft.hub.source import make_config, open_source
from jaxft.inference.generation import GenerationConfig, generate
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.contract import model_type_of
from jaxft.models.example import example_batch
from jaxft.models.layer_types import GLOBAL, LOCAL
from jaxft.tasks.causal_lm import Task


def without_dropout(family: str) -> Any:
    """The family's tiny config, which computes the same each time."""
    tiny = models.family(family).TINY
    return dataclasses.replace(tiny, **{f.name: 0.0 for f in dataclasses.fields(tiny) if "dropout" in f.name})


def reference_folder(folder: Path, family: Any, tokenizer: Path, **arch: Any) -> Any:
    """A tiny model of the reference, which it writes to ``folder`` with a tokenizer beside it, unless that is there. The vocabulary's last
    token ends texts."""
    vocabulary = max(json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1
    config = dataclasses.replace(without_dropout(model_name(family)), vocab_size=vocabulary, **arch)
    model = make_reference(family, config, "causal_lm", model_type_of(family, config))
    for said in (model.config, model.generation_config):
        said.bos_token_id = said.eos_token_id = vocabulary - 1
    if not folder.exists():
        model.save_pretrained(folder)
        for path in tokenizer.iterdir():
            shutil.copy(path, folder / path.name)
    return model


def model_name(family: Any) -> str:
    """What a family is called."""
    return str(family.__name__).rpartition(".")[2]


def case_of(family: str, values: dict[str, Any], number: int) -> tuple[Any, str | None]:
    """(the config of that number of 20 random ones, a head: each comes about equally often)."""
    heads = [head for head in models.family(family).HEADS if head is not None]
    head = heads[number % len(heads)]
    config = drawn(without_dropout(family), values, number)
    if "layer_types" in values and number % 2:  # as many as layers, local ones only where there is a window
        local = np.random.default_rng(number).random(config.num_hidden_layers) < 0.5
        types = tuple(LOCAL if near and config.sliding_window else GLOBAL for near in local)
        config = dataclasses.replace(config, layer_types=types)
    # The reference finds the last token of a text by the id of padding, which is nowhere else.
    return (dataclasses.replace(config, pad_token_id=0) if head == "classification" else config), head


def check_parity(family: str, config: Any, head: str, folder: Path) -> None:
    """Holds a head's values and gradients against the reference's."""
    module: Any = models.family(family)
    kind = model_type_of(module, config)
    if head != "causal_lm":
        compare_head(module, config, head, kind, folder)
        return
    torch = pytest.importorskip("torch")
    theirs = make_reference(module, config, head, kind)
    model, params = ours_of(module, theirs, config, head, folder / "values")
    batch = example_batch(module.facts(config), 4, length=20) | {"weights": np.ones(4, np.float32)}
    seen = batch["mask"].astype(bool)
    labels = torch.tensor(np.where(seen, batch["tokens"], -100).astype(np.int64))
    inputs = torch_inputs({name: batch[name] for name in ("tokens", "mask")})
    wanted = theirs(**inputs, labels=labels, output_hidden_states=True)
    wanted.loss.backward()

    def loss(params: Any) -> tuple[jax.Array, Any]:
        prepared = Task().prepare(jax.tree.map(jnp.asarray, batch), jax.random.key(0))
        given = {name: prepared[name] for name in model.facts.inputs if name in prepared}
        out = model.apply({"params": params}, **given, hidden_states=True)
        sums = Task().sums(lambda batch, key: out, prepared, None)
        return sums["loss"] / sums["weight"], out

    (value, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert len(out.hidden_states) == len(wanted.hidden_states) == config.num_hidden_layers + 1
    for number, state in enumerate(wanted.hidden_states):
        close(np.asarray(out.hidden_states[number])[seen], state[torch.tensor(seen)], f"state {number}")
    close(np.asarray(out.logits)[seen], wanted.logits[torch.tensor(seen)], "logits")
    close(value, wanted.loss, "loss")
    named = dict(theirs.named_parameters())
    for tensor in export_tensors(gradient, module.hf_layout(config, head), bare=False):
        close(tensor.read(), named[tensor.name].grad, tensor.name)


def check_round_trip(family: str, config: Any, head: str | None, folder: Path) -> None:
    """A folder of the reference comes back bit for bit, with a config.json that means the same to us and to it."""
    from safetensors.torch import load_file

    torch = pytest.importorskip("torch")
    module: Any = models.family(family)
    theirs = make_reference(module, config, head, model_type_of(module, config))
    theirs.save_pretrained(folder / "theirs")
    source = open_source(str(folder / "theirs"), lambda text: pytest.fail(text))
    assert source.head == head
    assert module.config_to_hf(source.config) == module.config_to_hf(config)
    assert source.config.kinds == config.kinds
    load(folder / "theirs", note=lambda text: None).save(folder / "ours")
    first, second = (load_file(folder / name / "model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = type(theirs).from_pretrained(folder / "ours", attn_implementation="eager").eval()
    own = ("_name_or_path", "architectures", "dtype", "transformers_version", "problem_type")
    before, after = ({k: v for k, v in one.config.to_dict().items() if k not in own} for one in (theirs, again))
    labels = ("id2label", "label2id") if module.HEADS[head].classes is None else ()
    assert {k: v for k, v in before.items() if k not in labels} == {k: v for k, v in after.items() if k not in labels}
    tokens = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.equal(theirs(tokens)[0], again(tokens)[0])


def check_generation(family: str, config: Any, lengths: tuple[int, ...], new: int = 12) -> None:
    """Greedy tokens of prompts together are those of the reference for each alone."""
    torch = pytest.importorskip("torch")
    module: Any = models.family(family)
    theirs = make_reference(module, config, "causal_lm", model_type_of(module, config))
    with tempfile.TemporaryDirectory() as folder:
        model, params = ours_of(module, theirs, config, "causal_lm", Path(folder))
    prompts = [np.random.default_rng(n).integers(5, config.vocab_size, n).tolist() for n in lengths]
    found = generate(model, params, prompts, GenerationConfig(max_new_tokens=new)).tokens
    theirs.generation_config.eos_token_id = None
    for prompt, made in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0
        )
        assert made == out[0, len(prompt) :].tolist(), len(prompt)


def check_packed(family: str, config: Any) -> None:
    """Texts that share a row give what they give by themselves."""
    from jaxft.models.initial import init_params

    module: Any = models.family(family)
    model = module.Model(config, "causal_lm", Compute())
    params = jax.tree.map(lambda leaf: leaf + 0.1 * (leaf.ndim == 2), init_params(model, 0))
    lengths = (9, 14, 3)
    texts = [np.random.default_rng(n).integers(5, 96, n).astype(np.int32) for n in lengths]
    packed = {
        "tokens": np.concatenate([*texts, np.zeros(2, np.int32)])[None],
        "segments": np.repeat([1, 2, 3, 0], [*lengths, 2])[None].astype(np.int32),
        "positions": np.concatenate([np.arange(n) for n in (*lengths, 2)])[None].astype(np.int32),
    }
    apply = jax.jit(model.apply)
    found, start = apply({"params": params}, **packed).logits[0], 0
    for text in texts:
        alone = apply({"params": params}, text[None]).logits[0]
        np.testing.assert_allclose(found[start : start + len(text)], alone, atol=2e-5)
        start += len(text)


def config_of(family: str, tree: dict[str, Any]) -> Any:
    """The Config that a config.json means, as it would be read."""
    module: Any = models.family(family)
    return make_config(module, module.config_from_hf(json.loads(json.dumps(tree))))
