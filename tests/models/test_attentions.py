"""Probabilities of attention, asked for, against the reference's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kinds import TEXTS
from reference import close, make_reference, ours_of, torch_inputs

from jaxft import models
from jaxft.models.example import example_batch

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


QUICK = ("bert", "llama", "modernbert")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {}),
        ("roberta", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("distilbert", "electra", "mpnet")),
        pytest.param("albert", {"inner_group_num": 1}, marks=pytest.mark.slow),
        ("llama", {}),
        ("llama", {"attention_bias": True, "num_key_value_heads": 1}),
    ],
)
def test_probabilities_equal_the_reference(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    module = models.family(family)
    config: Any = dataclasses.replace(module.TINY, num_hidden_layers=2, **changes)
    theirs = make_reference(module, config, None, family)
    model, params = ours_of(module, theirs, config, None, tmp_path)
    batch = example_batch(module.facts(config), 3, length=12)
    out = model.apply({"params": params}, **batch, attentions=True)
    with torch.no_grad():
        expected = torch.stack(theirs(**torch_inputs(batch), output_attentions=True).attentions)
    assert out.hidden_states is None
    assert out.attentions.shape == (2, 3, config.num_attention_heads, 12, 12)
    for row, length in enumerate(batch["mask"].sum(-1)):  # what padding looks at means nothing
        ours = np.asarray(out.attentions)[:, row, :, :length]
        close(ours, expected[:, row, :, :length], f"row {row}")
        np.testing.assert_allclose(ours.sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in TEXTS]
)
def test_packed_texts_look_at_their_own_alone(family: str) -> None:
    from jaxft.layers import Compute
    from jaxft.models.initial import init_params

    module: Any = models.family(family)
    model = module.Model(module.TINY, None, Compute())
    segments = np.array([[1, 1, 1, 2, 2, 0]])
    out = model.apply(
        {"params": init_params(model, 0)},
        np.arange(5, 11)[None],
        segments=segments,
        attentions=True,
        hidden_states=True,
    )
    assert out.hidden_states.shape[0] == len(out.attentions) + 1
    apart = segments[0][:, None] != segments[0]
    assert not np.asarray(out.attentions)[..., apart].any()
    assert not np.asarray(out.attentions)[..., 5, :].any()  # padding sees nothing
