"""Calls keep to the shapes that signatures state: while models are traced, each public function and module checks its own."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any, get_type_hints

import jax
import jax.numpy as jnp
import pytest
from beartype.door import is_bearable
from jaxtyping import jaxtyped

from jaxft import layers, models
from jaxft.attention import MaskSpec
from jaxft.layers import Compute
from jaxft.models.contract import Features, Output
from jaxft.models.example import example_batch
from jaxft.models.initial import shapes_and_axes

FUNCTIONS = [
    *(("jaxft.attention", name) for name in ("attend",)),
    *(
        ("jaxft.layers", name)
        for name in layers.__all__
        if inspect.isfunction(getattr(layers, name)) or isinstance(getattr(layers, name), jax.custom_vjp)
    ),
]


def class_of(family: str) -> str:
    """The name of the class that a family's models are of; ``Model`` itself may be a function that chooses one."""
    module = models.family(family)
    return type(module.Model(module.TINY)).__name__


MODULES = (
    *(("jaxft.layers", name) for name in ("Embed", "FromHeads", "LayerNorm", "Linear", "Projection", "RMSNorm")),
    *(("jaxft.models.blocks", name) for name in ("RotaryAttention", "GatedMlp")),
    *(("jaxft.models.vision", name) for name in ("Embeddings", "ImageClasses", "LayerScale", "Mlp", "Patches")),
    ("jaxft.models.families.whisper", "Convolution"),
    ("jaxft.models.families.whisper", "Places"),
    *(("jaxft.models.heads", name) for name in ("PooledClasses", "FirstTokenClasses", "TokenClasses")),
    *(("jaxft.models.heads", name) for name in ("TransformedClasses", "MaskedLm", "MaskedLmAndPairs")),
    *((f"jaxft.models.families.{name}", class_of(name)) for name in models.families()),
)


class Mismatch(TypeError):
    """A value that is not what a signature says."""


def checked(function: Callable[..., Any], called: set[str], name: str) -> Callable[..., Any]:
    """A function that checks its arguments and its result; the dims of a call agree with each other."""
    plain = inspect.unwrap(function)
    signature, hints = inspect.signature(plain), get_type_hints(plain)

    def check(part: str, value: Any) -> None:
        if part in hints and not is_bearable(value, hints[part]):
            raise Mismatch(f"{name}: {part} is {jax.tree.map(jax.typeof, value)}, not {hints[part]}")

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        called.add(name)
        with jaxtyped("context"):
            for part, value in bound.arguments.items():
                if signature.parameters[part].kind not in (
                    inspect.Parameter.VAR_POSITIONAL,
                    inspect.Parameter.VAR_KEYWORD,
                ):
                    check(part, value)
            result = function(*arguments, **named)
            check("return", result)
        return result

    return call


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Has every public function check itself, wherever it has been imported; and tells which were called."""
    names: set[str] = set()
    for home, name in FUNCTIONS:
        plain = getattr(importlib.import_module(home), name)
        own = checked(plain, names, name)
        for module in [module for key, module in sys.modules.items() if key.startswith("jaxft.")]:
            for alias in [alias for alias, value in vars(module).items() if value is plain]:
                monkeypatch.setattr(module, alias, own)
    for home, name in MODULES:
        module: Any = getattr(importlib.import_module(home), name)
        monkeypatch.setattr(module, "__call__", checked(module.__call__, names, name))
    return names


def check_fields(value: Any) -> None:
    """Raises :class:`Mismatch` if the fields of a tuple are not as it declares them, together."""
    with jaxtyped("context"):
        for name, hint in get_type_hints(type(value)).items():
            if not is_bearable(getattr(value, name), hint):
                raise Mismatch(f"{type(value).__name__}.{name} is not {hint}: {value}")


HEADS = [(name, head) for name in models.families() for head in models.family(name).HEADS]
CASES = [
    *((*each, Compute()) for each in HEADS),
    *((*each, Compute("bfloat16", "bfloat16", layers="scanned")) for each in HEADS if each[1] is None),
    *((*each, Compute(vocab_tile=40)) for each in HEADS if each[1] in ("masked_lm", "causal_lm")),
]


# Each family without a head, and each head and way to compute of some family.
QUICK = {("bert", head) for head in models.family("bert").HEADS} | {("t5", "seq2seq_lm"), ("whisper", "speech_to_text")}
QUICK |= {("llama", "causal_lm"), ("vit", "image_classification")}


def _is_quick(family: str, head: str | None, how: Compute) -> bool:
    if how.layers == "scanned":
        return family in ("bert", "llama", "modernbert", "t5", "whisper")
    return (head is None or (family, head) in QUICK) and (how.vocab_tile is None or family in ("bert", "llama"))


@pytest.mark.parametrize(
    ("family", "head", "how"),
    [pytest.param(*case, marks=[] if _is_quick(*case) else [pytest.mark.slow]) for case in CASES],
)
def test_models_keep_to_the_shapes_that_signatures_state(
    called: set[str], family: str, head: str | None, how: Compute
) -> None:
    module = models.family(family)
    model: Any = module.Model(module.TINY, head, how)
    batch = jax.tree.map(jnp.asarray, example_batch(model.facts, 2, length=8))
    if how.vocab_tile is not None and "targets" in model.facts.inputs:
        batch["targets"] = batch["tokens" if "tokens" in batch else "decoder_tokens"]

    def forward(params: Any, batch: Any, key: Any) -> None:
        output = model.apply({"params": params}, **batch, key=key, hidden_states=True)
        check_fields(output)
        assert (output.score is not None) == ("targets" in batch)
        if output.score is not None:
            check_fields(output.score)

    jax.eval_shape(forward, shapes_and_axes(model)[0], batch, jax.random.key(0))
    assert {"apply_stack", "attend", "subkey", "Linear", "affine", class_of(family)} <= called
    assert ({"text": "Embed", "image": "Patches", "audio": "Convolution"}[model.facts.processor]) in called


def test_a_wrong_shape_is_caught(called: set[str]) -> None:
    del called
    attend = importlib.import_module("jaxft.attention").attend
    q, k = jnp.zeros((2, 4, 8, 16)), jnp.zeros((2, 2, 8, 16))
    attend(q, k, k, MaskSpec(), Compute(attention="xla"))
    for wrong in (k[..., :8], k[:1], k[0], k.astype(jnp.int32)):
        with pytest.raises(Mismatch, match=r"attend: v is .*not .*'B K T H'"):
            attend(q, k, wrong, MaskSpec(), Compute(attention="xla"))
    with pytest.raises(Mismatch, match="layer_norm: scale"):
        layers.layer_norm(q, jnp.ones(8), jnp.ones(16), 1e-5)
    bert: Any = models.family("bert")
    model, ids = bert.Model(bert.TINY, "classification"), jnp.zeros((2, 4), jnp.int32)
    for name, wrong in {"mask": jnp.ones((2, 5)), "types": ids[:1], "tokens": ids.astype(jnp.float32)}.items():
        with pytest.raises(Mismatch, match=f"Model: {name} is "):
            model.init(jax.random.key(0), **{"tokens": ids, name: wrong})
    with pytest.raises(Mismatch, match=r"Output\.pooled"):
        check_fields(Output(jnp.zeros((2, 3, 4)), jnp.zeros((3, 4))))
    with pytest.raises(Mismatch, match=r"Features\.targets"):
        check_fields(Features(jnp.zeros((2, 3, 4)), targets=jnp.zeros((2, 4), jnp.int32)))
