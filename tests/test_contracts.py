"""Families and tasks keep their contracts: for the type checker, which reads the two tables, and by being there."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import numpy as np
import pytest

from jaxft import models, tasks
from jaxft.config import RunConfig
from jaxft.config.tasks import task_options
from jaxft.data.batch import collate, text_shape
from jaxft.models.contract import Facts, Family, architecture_of, architectures, example_batch, head_of, with_classes
from jaxft.models.families import bert, llama, modernbert, roberta
from jaxft.models.initial import shapes_and_axes
from jaxft.models.layout import Layout
from jaxft.tasks import Targets, TaskModule, causal_lm, classification, masked_lm, token_classification
from jaxft.training.setup import stand_in_tokenizer
from jaxft.trees import leaves_of, paths_of

FAMILIES: tuple[Family, ...] = (bert, llama, modernbert, roberta)
TASKS: tuple[TaskModule, ...] = (causal_lm, classification, masked_lm, token_classification)
HEADS = [(name, head) for name in models.families() for head in models.family(name).HEADS]


def test_all_are_listed() -> None:
    assert [models.family(name) for name in models.families()] == list(FAMILIES)
    assert [tasks.task(name) for name in tasks.tasks()] == list(TASKS)


# ---------------------------------------------------------------------------------------------------------- families


def exported_names(layout: Layout, bare: bool) -> list[str]:
    """What tensors of the first layer are called in a folder."""
    names = [rule.theirs.format(layer=0) for rule in layout.rules]
    return [name.removeprefix(layout.prefix) for name in names] if bare else names


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_exported_tensors_show_their_head(family: str, head: str | None) -> None:
    module = models.family(family)
    names = exported_names(module.hf_layout(module.TINY, head), bare=head is None)
    shown = head_of(names, module.HEADS)
    if head is None or shown == head:
        assert shown == head
        return
    # Heads whose tensors are the same: neither is taken for the other.
    assert shown not in module.HEADS
    alike = [name for name, other in module.HEADS.items() if name and other.marks == module.HEADS[head].marks]
    assert str(shown).split(" or ") == sorted(alike, key=str(shown).split(" or ").index)


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_the_references_class_is_read_as_the_head_that_it_is_written_for(family: str, head: str | None) -> None:
    module = models.family(family)
    for kind in module.MODEL_TYPES:
        assert architectures(module)[architecture_of(module, head, kind)] == head
    suffixes = [suffix for one in module.HEADS.values() for suffix in (one.suffix, *one.read_as)]
    assert len(suffixes) == len(set(suffixes))


def test_no_two_families_claim_a_model_type() -> None:
    assert sum(len(module.MODEL_TYPES) for module in FAMILIES) == len(models.model_types())


@pytest.mark.parametrize("family", models.families())
def test_facts_are_those_of_the_model(family: str) -> None:
    module = models.family(family)
    model: Any = module.Model(module.TINY, None)
    facts = module.facts(module.TINY)
    assert facts == model.facts
    assert set(facts.inputs) <= set(inspect.signature(module.Model.__call__).parameters)
    assert set(example_batch(facts, 2)) <= set(facts.inputs)
    shapes, axes = shapes_and_axes(model)
    flat, leaves = paths_of(shapes), leaves_of(shapes, axes)
    for stack in facts.stacks:
        ends = {
            leaf.first_layer + (leaf.layers or 0) for path, leaf in leaves.items() if path.startswith(f"{stack.path}/")
        }
        assert ends == {stack.layers}
    assert facts.vocabulary is not None
    assert any(leaf.shape == (facts.vocabulary, facts.stacks[0].width) for leaf in flat.values())


@pytest.mark.parametrize(("family", "head"), [(f, h) for f, h in HEADS if models.family(f).HEADS[h].classes])
def test_classes_are_of_what_the_head_says(family: str, head: str) -> None:
    module = models.family(family)
    model: Any = module.Model(with_classes(module.TINY, 7), head)
    batch = example_batch(model.facts, 3)
    out = jax.eval_shape(
        lambda params, batch: model.apply({"params": params}, **batch), shapes_and_axes(model)[0], batch
    )
    rows, length = batch["tokens"].shape
    assert out.logits.shape == ((rows, 7) if module.HEADS[head].classes == "rows" else (rows, length, 7))
    assert out.logits.dtype == np.float32


# ------------------------------------------------------------------------------------------------------------- tasks


def made(name: str) -> Any:
    return tasks.task(name).make_task(
        task_options(name)(name=name), Targets(("O", "B-a"), (3, 1)), Facts({}, ()), stand_in_tokenizer()
    )


@pytest.mark.parametrize("name", tasks.tasks())
def test_a_task_is_a_value_of_a_head_that_a_family_has(name: str) -> None:
    assert hash(made(name)) == hash(made(name))
    assert made(name) == made(name)
    assert any(made(name).head in module.HEADS for module in FAMILIES)
    assert tasks.task_of_head(made(name).head) is tasks.task(name)


@pytest.mark.parametrize("name", tasks.tasks())
def test_padding_is_as_declared_and_weighs_nothing(name: str) -> None:
    fields, shape = tasks.task(name).fields(RunConfig(), 9), text_shape(2, 5)
    empty = collate([], fields, shape)
    assert empty.keys() == fields.keys()
    for field, value in empty.items():
        assert (value.shape, value.dtype) == (fields[field].shape(shape), np.dtype(fields[field].dtype))
        assert (value == fields[field].fill).all()
        assert value.shape[0] == 2
    assert (empty["tokens"] == 9).all()
    assert not empty["weights"].any()
    assert float(made(name).weight(made(name).prepare(jax.device_put(empty), jax.random.key(0)))) == 0
