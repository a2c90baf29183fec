"""Tokens that follow, against the reference's ``generate``: greedy, with penalties, and what draws are made from."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.config import MeshConfig
from jaxft.errors import UserError
from jaxft.inference.generation import GenerationConfig, generate
from jaxft.layers import Compute
from jaxft.models.decoding.sampling import warped
from jaxft.models.families import llama
from jaxft.models.initial import init_params
from jaxft.parallel.sharding import make_mesh

PROMPTS = [np.random.default_rng(i).integers(5, 96, n).tolist() for i, n in enumerate((9, 1, 4, 17, 6))]


@functools.cache
def made() -> tuple[Any, Any]:
    model = llama.Model(llama.TINY, "causal_lm", Compute())
    return model, jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, init_params(model, 0))


@functools.cache
def reference() -> Any:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from jaxft.hub.convert import export_tensors

    model, params = made()
    config = transformers.LlamaConfig(**llama.config_to_hf(model.config), attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config).eval()
    layout = llama.hf_layout(model.config, model.head)
    tensors = {
        one.name: torch.tensor(np.asarray(one.read())) for one in export_tensors(params, layout, bare=False, dtype=None)
    }
    theirs.load_state_dict(tensors)
    return theirs


def theirs(prompt: list[int], config: GenerationConfig) -> list[int]:
    torch = pytest.importorskip("torch")
    how = {
        name: getattr(config, name)
        for name in ("max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams")
    }
    if config.num_beams > 1:
        how |= {"length_penalty": config.length_penalty, "early_stopping": config.early_stopping}
    ends = list(config.eos_token_id) or None
    out = reference().generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        eos_token_id=ends, pad_token_id=0, **{k: v for k, v in how.items() if v or k in ("length_penalty", "early_stopping")}
    )  # fmt: skip
    found = out[0, len(prompt) :].tolist()
    return found[:-1] if ends and found[-1] in ends else found


CASES = [
    {"max_new_tokens": 24},
    {"max_new_tokens": 24, "repetition_penalty": 1.7},
    {"max_new_tokens": 24, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 24, "no_repeat_ngram_size": 1},
    {"max_new_tokens": 24, "eos_token_id": (7, 31, 50, 64)},
    {"max_new_tokens": 24, "eos_token_id": (7, 31, 50, 64), "min_new_tokens": 12, "no_repeat_ngram_size": 3},
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_greedy_tokens_are_the_references_whatever_stands_beside(settings: dict[str, Any]) -> None:
    model, params = made()
    config = GenerationConfig(**settings)
    together = generate(model, params, PROMPTS, config)
    assert together.tokens == [theirs(prompt, config) for prompt in PROMPTS]
    assert together.tokens[1] == generate(model, params, PROMPTS[1:2], config).tokens[0]
    assert [end or len(row) == 24 for row, end in zip(together.tokens, together.ended, strict=True)] == [True] * 5


ENDS = (7, 31, 50, 64, 11, 80)
BEAMS = [
    {"num_beams": 4},
    {"num_beams": 3, "eos_token_id": ENDS},
    {"num_beams": 4, "eos_token_id": ENDS[:1], "length_penalty": 2.0},
    {"num_beams": 4, "eos_token_id": ENDS, "early_stopping": True, "length_penalty": 0.0},
    {"num_beams": 4, "eos_token_id": ENDS, "early_stopping": "never", "length_penalty": 1.5},
    {"num_beams": 5, "eos_token_id": ENDS, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "length_penalty": -0.5},
    {
        "num_beams": 2,
        "eos_token_id": ENDS[:2],
        "repetition_penalty": 1.4,
        "early_stopping": "never",
        "length_penalty": -1.0,
    },
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("settings", BEAMS, ids=str)
def test_beams_find_what_the_references_find_whatever_stands_beside(settings: dict[str, Any]) -> None:
    model, params = made()
    config = GenerationConfig(max_new_tokens=20, **settings)
    together = generate(model, params, PROMPTS, config)
    assert together.tokens == [theirs(prompt, config) for prompt in PROMPTS]
    assert together.tokens[1] == generate(model, params, PROMPTS[1:2], config).tokens[0]


def test_settings_of_beams_are_checked() -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"num_beams": 0}, "num_beams=0: must be a whole number from 1"),
        ({"num_beams": 2, "do_sample": True}, "beams are compared by their probability, and not drawn"),
        ({"early_stopping": "soon"}, "early_stopping='soon': must be true, false or 'never'"),
        ({"length_penalty": float("inf")}, "length_penalty=inf: must be a finite number"),
    )
    for wrong, told in cases:
        with pytest.raises(UserError, match=told):
            GenerationConfig(**wrong)


WARPED = [
    {"temperature": 0.3},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("settings", WARPED, ids=str)
def test_draws_are_made_from_what_the_references_are(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    scores = np.random.default_rng(1).normal(size=(64, 50)).astype(np.float32) * 3
    wanted = torch.tensor(scores)
    kinds = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP", "min_p": "MinP"}
    for name, kind in kinds.items():
        if name in settings:
            wanted = getattr(transformers, f"{kind}LogitsWarper")(settings[name])(None, wanted)
    found = np.asarray(warped(jnp.asarray(scores), GenerationConfig(do_sample=True, **settings)))
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-6)


def test_draws_depend_on_the_prompt_and_the_seed_alone_and_follow_the_probabilities() -> None:
    model, params = made()
    config = GenerationConfig(max_new_tokens=12, do_sample=True, temperature=0.7)
    first = generate(model, params, PROMPTS, config, seed=1).tokens
    assert generate(model, params, PROMPTS[::-1], config, seed=1).tokens == first[::-1]
    assert generate(model, params, PROMPTS[2:3], config, seed=1).tokens == first[2:3]
    assert generate(model, params, PROMPTS, config, seed=2).tokens != first
    # The first token of many seeds, against the probabilities of the model.
    one = GenerationConfig(max_new_tokens=1, do_sample=True, top_k=4)
    logits = model.apply({"params": params}, jnp.array([PROMPTS[2]])).logits[:, -1]
    chances = np.asarray(jax.nn.softmax(warped(logits, one), -1))[0]
    drawn = [generate(model, params, [PROMPTS[2]], one, seed=seed).tokens[0][0] for seed in range(200)]
    share = np.bincount(drawn, minlength=len(chances)) / 200
    assert np.abs(share - chances).max() < 0.12
    assert set(np.flatnonzero(share)) <= set(np.flatnonzero(chances))


def test_a_mesh_makes_the_same_tokens() -> None:
    model, params = made()
    config = GenerationConfig(max_new_tokens=10)
    wanted = generate(model, params, PROMPTS, config).tokens
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    from jaxft.inference.devices import Devices

    with jax.set_mesh(mesh):
        assert generate(model, Devices(mesh).spread(model, params), PROMPTS, config).tokens == wanted


def test_what_cannot_be_is_one_line() -> None:
    model, params = made()
    with pytest.raises(UserError, match="beyond the model's limit of 64 positions; set max_new_tokens to 60 or less"):
        generate(model, params, [[7, 8, 9, 10]], GenerationConfig(max_new_tokens=61))
    assert len(generate(model, params, [[7, 8, 9, 10]], GenerationConfig(max_new_tokens=60)).tokens[0]) == 60
    with pytest.raises(UserError, match="a prompt has no tokens"):
        generate(model, params, [[5], []], GenerationConfig(max_new_tokens=1))
    with pytest.raises(UserError, match="makes no texts"):
        generate(model.clone(head=None), params, [[5]], GenerationConfig(max_new_tokens=1))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"top_p": 0.0}, "top_p=0.0: must be above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_p": 2}, "min_p=2"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"min_new_tokens": 200}, "is above max_new_tokens"),
    ]
    for settings, said in cases:
        with pytest.raises(UserError, match=said):
            GenerationConfig(**settings)
