"""Tokens that a draft proposes: greedy texts are those without it, and drawn ones have the model's distribution."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import UserError
from jaxft.inference.generation import Draft, GenerationConfig, generate, generate_with_draft
from jaxft.layers import Compute
from jaxft.models.decoding.speculative import begin_with_draft, speculate
from jaxft.models.families import llama
from jaxft.models.initial import init_params

PROMPTS = [np.random.default_rng(i).integers(0, 40, n).tolist() for i, n in enumerate((3, 7, 20, 1))]


def made(layers: int, seed: int, vocabulary: int = 40) -> tuple[Any, Any]:
    config = dataclasses.replace(
        llama.TINY, vocab_size=vocabulary, num_hidden_layers=layers, initializer_range=0.3, max_position_embeddings=96
    )
    model = llama.Model(config, "causal_lm", Compute())
    return model, init_params(model, seed)


def first_layers(params: Any, count: int) -> Any:
    return {**params, "layers": jax.tree.map(lambda leaf: leaf[:count], params["layers"])}


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({"eos_token_id": (3, 5, 7)}, 4),
        pytest.param({}, 1, marks=pytest.mark.slow),
        pytest.param(
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": (3, 7, 9, 11)},
            5,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_greedy_tokens_are_those_without_a_draft(settings: dict[str, Any], count: int) -> None:
    model, params = made(3, 0)
    small, _ = made(1, 0)
    config = GenerationConfig(max_new_tokens=40, **settings)
    alone = generate(model, params, PROMPTS, config)
    for weights in (
        first_layers(params, 1),
        init_params(small, 5),
    ):  # one that often guesses right, and one that hardly does
        assert generate_with_draft(model, params, Draft(small, weights, count), PROMPTS, config) == alone
    assert len({len(row) for row in alone.tokens}) > 1 or not settings


@pytest.mark.slow
def test_a_draft_that_is_the_model_is_always_right() -> None:
    model, params = made(2, 0)
    config = GenerationConfig(max_new_tokens=24)
    begun = begin_with_draft(model, params, Draft(model, params, 6), PROMPTS[:1], config)
    first = int(begun.state.at)
    found = speculate(model, model, 6, config, params, params, begun, first + 24)
    assert (int(found.state.at) - first, int(found.rounds)) == (24, 4)


@pytest.mark.slow
def test_drawn_tokens_depend_on_their_prompt_alone() -> None:
    model, params = made(3, 0)
    small, _ = made(1, 0)
    config = GenerationConfig(max_new_tokens=16, do_sample=True, top_p=0.95, eos_token_id=(3,))
    weights = first_layers(params, 1)
    found = [generate_with_draft(model, params, Draft(small, weights, k), PROMPTS, config, seed=4) for k in (1, 4)]
    assert found[0] == found[1]
    alone = generate_with_draft(model, params, Draft(small, weights, 4), PROMPTS[1:2], config, seed=4)
    assert alone.tokens[0] == found[0].tokens[1]
    other = generate_with_draft(model, params, Draft(small, weights, 4), PROMPTS, config, seed=5)
    assert other != found[0]


def chances_of(model: Any, params: Any, prompt: list[int], length: int) -> np.ndarray:
    """The probability of each text of so many tokens after a prompt, in the order of ``itertools.product``."""
    count = model.config.vocab_size
    texts = np.array(list(itertools.product(range(count), repeat=length)))
    ids = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)
    logits = model.apply({"params": params}, jnp.asarray(ids)).logits
    steps = np.asarray(jax.nn.log_softmax(logits[:, len(prompt) - 1 : -1], -1), np.float64)
    return np.exp(np.take_along_axis(steps, texts[:, :, None], -1).sum((1, 2)))


def test_drawn_texts_have_the_distribution_of_the_model() -> None:
    model, params = made(2, 0, vocabulary=5)
    small, weights = made(1, 7, vocabulary=5)
    prompt, draws, length = [1, 2, 0], 8_000, 3
    config = GenerationConfig(max_new_tokens=length, do_sample=True)
    begun = begin_with_draft(model, params, Draft(small, weights, 2), [prompt], config)
    first = int(begun.state.at)

    def text(key: jax.Array) -> jax.Array:
        one = begun._replace(state=begun.state._replace(keys=key[None]))
        return speculate(model, small, 2, config, params, weights, one, first + length).state.tokens[
            0, first : first + length
        ]

    found = np.asarray(jax.jit(jax.vmap(text))(jax.random.split(jax.random.key(3), draws)))
    seen = np.bincount(found @ np.array([25, 5, 1]), minlength=125)
    wanted = draws * chances_of(model, params, prompt, length)
    other = draws * chances_of(small, weights, prompt, length)

    def distance(expected: np.ndarray) -> float:
        """Pearson's statistic; texts that are hardly expected count as one."""
        order = np.argsort(expected)
        rare = order[np.cumsum(expected[order]) < 20]
        common = np.setdiff1d(order, rare)
        both = [np.append(one[common], one[rare].sum()) for one in (seen, expected)]
        return float(((both[0] - both[1]) ** 2 / np.maximum(both[1], 1e-9)).sum() / len(both[0]))

    # By its degrees of freedom: 1 +- 0.13 if the distribution is right.
    assert distance(wanted) < 1.5
    assert distance(other) > 10


def test_what_does_not_fit_is_told() -> None:
    model, params = made(1, 0)
    small, weights = made(1, 0, vocabulary=39)
    config = GenerationConfig(max_new_tokens=4)
    with pytest.raises(UserError, match="the draft has a vocabulary of 39 tokens, the model one of 40"):
        generate_with_draft(model, params, Draft(small, weights), PROMPTS, config)
    with pytest.raises(UserError, match="num_beams=2: beams are searched without a draft"):
        generate_with_draft(model, params, Draft(model, params), PROMPTS, dataclasses.replace(config, num_beams=2))
