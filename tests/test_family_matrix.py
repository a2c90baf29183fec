"""What each family can be used for: a step of each kind of run, as its recipe makes it, or one line that says why there is none."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from kinds import KINDS, TEXTS, family_of, reads_text, tiny_config
from tasks.test_packed_texts import ROOM, batch_of, texts_of
from test_layouts import batches

from jaxft import models, tasks
from jaxft.config import DataConfig, LoraConfig, MeshConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, to_tree
from jaxft.config.tasks import task_options
from jaxft.data.packing import pack
from jaxft.errors import UserError
from jaxft.models.initial import init_params
from jaxft.parallel.sharding import batch_sharding, jitted, make_mesh, replicated
from jaxft.training.processors import stand_in_tokenizer
from jaxft.training.recipe import Recipe, assumed_targets, make_recipe
from jaxft.trees import paths_of

ROWS = 16
USES: dict[str, dict[str, Any]] = {
    "classify": {},
    "tokens": {"task": "token_classification"},
    "questions": {"task": "question_answering"},
    "masked LM": {"task": "masked_lm"},
    "embed": {"task": "embedding"},
    "re-rank": {"task": "reranking"},
    "multiple choice": {"task": "multiple_choice"},
    "LoRA": {"lora": True},
    "packed": {"packed": True},
    "2x2x2 mesh": {"mesh": MeshConfig(2, 2, 2)},
}
FAMILIES = (*TEXTS, *(kind for kind in KINDS if reads_text(kind)))
HEADS_OF = {
    "tokens": "token_classification",
    "questions": "question_answering",
    "masked LM": "masked_lm",
    "multiple choice": "multiple_choice",
}
# Decoders hide no tokens, and the reference has no classes of theirs for choices.
DECODERS = ("masked LM", "multiple choice")
LACKING = {
    **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2", "qwen3", "smollm3"), DECODERS),
    # Nor has it such classes of these.
    "gemma2": ("questions", *DECODERS),
    **dict.fromkeys(("gemma3_text", "olmo2"), ("questions", "tokens", *DECODERS)),
    **dict.fromkeys(("rotary_bert", "gte", "eurobert"), ("questions", "multiple choice")),
}
REFUSED = {(family, use) for family, uses in LACKING.items() for use in uses}
"""What a family cannot be used for."""
# The reference has classes for rows and answers of some encoder-decoders, for words of T5 alone; they hide no tokens.
NEITHER = tuple(use for use in USES if use != "embed")
SOURCES = {"bart": ("tokens", *DECODERS), "marian": NEITHER, "m2m100": NEITHER, "t5": DECODERS}
REFUSED |= {(family, use) for family, uses in SOURCES.items() for use in uses}


def recipe_of(family: str, use: str) -> Recipe:
    """The recipe of a run on random weights."""
    how = USES[use]
    name = how.get("task", "classification")
    owner = family_of(family)
    arch = dict(to_tree(dataclasses.replace(tiny_config(family), num_hidden_layers=2)))
    arch.pop("num_labels", None)
    config = RunConfig(
        task=task_options(name)(name=name),
        model=ModelConfig(family=owner, arch=arch, lora=LoraConfig(rank=2 if how.get("lora") else None)),
        data=DataConfig(max_length=ROOM, packing="best_fit" if how.get("packed") else "none"),
        optim=OptimConfig(warmup_steps=0, learning_rate=1e-2),
        train=TrainConfig(batch_size=ROWS, steps=1),
        mesh=how.get("mesh", MeshConfig(1, 1, 1)),
    )
    module = tasks.task(name)
    head = models.family(owner).HEADS.get(module.Task.head)
    labels = ("O", "B-a", "I-a") if name == "token_classification" else ("a", "b", "c")
    of_classes = head is not None and head.classes
    targets = assumed_targets(config, labels) if of_classes else tasks.Targets()
    mesh = make_mesh(config.mesh, jax.devices()[: 8 if "mesh" in how else 1])
    return make_recipe(config, mesh, None, targets, stand_in_tokenizer(96), 1, "cpu")


def host_batch(use: str) -> dict[str, np.ndarray]:
    """A batch of such a run."""
    if USES[use].get("packed"):
        return dict(batch_of(pack(texts_of("classification"), ROOM), ROWS))
    return batches(USES[use].get("task", "classification"))[0]


CASES = [(family, use) for family in FAMILIES for use in USES]


@pytest.mark.sampled(24)
@pytest.mark.parametrize(("family", "use"), CASES)
def test_a_step_learns_or_says_why_not(family: str, use: str) -> None:
    if (family, use) in REFUSED:
        with pytest.raises(UserError) as refused:
            recipe_of(family, use)
        task, wanted = USES[use].get("task", "classification"), HEADS_OF.get(use, "classification")
        owner = family_of(family)
        assert f"task.name={task}: {owner} has no head {wanted!r}, only: " in str(refused.value)
        return
    recipe = recipe_of(family, use)
    mesh, rules = recipe.mesh, recipe.model.compute.rules
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, recipe.state)
        state = jitted(recipe.start, mesh, places)(init_params(recipe.model, 0, recipe.shardings))
        before = jax.device_get(state.params)
        made = {name: value for name, value in host_batch(use).items() if name in recipe.fields}
        batch = {
            name: jax.device_put(value, batch_sharding(mesh, rules, recipe.fields[name].axes))
            for name, value in made.items()
        }
        state, metrics = recipe.train_program()(state, batch, jax.device_put(np.uint32(0), replicated(mesh)))
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["grad_norm"]) > 0
    assert int(metrics["skipped"]) == 0
    after = paths_of(jax.device_get(state.params))
    assert any((after[path] != leaf).any() for path, leaf in paths_of(before).items())


def test_all_that_the_reference_has_a_class_for_works() -> None:
    transformers = pytest.importorskip("transformers")
    modules, wanted = [models.family(name) for name in models.families()], (*HEADS_OF.values(), "classification")
    suffixes = {module.HEADS[name].suffix for module in modules for name in wanted if name in module.HEADS}
    for family, use in REFUSED:
        module = models.family(family_of(family))
        named = {models.family("bert").HEADS[HEADS_OF.get(use, "classification")].suffix} & suffixes
        assert not [
            stem + one for stem in module.MODEL_TYPES.values() for one in named if hasattr(transformers, stem + one)
        ]
