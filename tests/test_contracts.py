"""Families and tasks keep their contracts: for the type checker, which reads the two tables, and by being there."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from jaxft import models, tasks
from jaxft.config import RunConfig
from jaxft.config.tasks import task_options
from jaxft.data.batch import Shape, collate, text_fields, text_shape
from jaxft.data.cache import Cache, open_cache, write_cache
from jaxft.data.examples import Encoded, Examples, Split, make_split
from jaxft.data.packing import CLASSES, Packed, pack
from jaxft.data.processors.contract import Processor, SpecialIds, TextProcessor
from jaxft.data.processors.image import ImageProcessor
from jaxft.data.processors.speech import SpeechProcessor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.models.contract import Facts, Family, architecture_of, architectures, head_of, head_of_class, with_classes
from jaxft.models.example import example_batch
from jaxft.models.families import (
    albert,
    bart,
    bert,
    deberta_v2,
    deit,
    dinov2,
    distilbert,
    electra,
    gemma2,
    gemma3_text,
    gpt2,
    llama,
    m2m100,
    marian,
    mistral,
    modernbert,
    mpnet,
    olmo2,
    qwen2,
    qwen3,
    roberta,
    rotary_bert,
    smollm3,
    t5,
    vit,
    whisper,
)
from jaxft.models.initial import shapes_and_axes
from jaxft.models.layout import Layout
from jaxft.tasks import (
    Targets,
    TaskModule,
    causal_lm,
    chat,
    classification,
    denoising,
    embedding,
    image_classification,
    masked_lm,
    multi_label,
    multiple_choice,
    preference,
    question_answering,
    regression,
    replaced_token_detection,
    reranking,
    sentence_pairs,
    seq2seq,
    span_corruption,
    speech_to_text,
    token_classification,
)
from jaxft.training.processors import stand_in_processor
from jaxft.trees import leaves_of

FAMILIES: tuple[Family, ...] = (
    *(
        albert,
        bart,
        bert,
        deberta_v2,
        deit,
        dinov2,
        distilbert,
        electra,
        gemma2,
        gemma3_text,
        gpt2,
        llama,
        m2m100,
        marian,
        mistral,
        modernbert,
        mpnet,
        olmo2,
    ),
    *(qwen2, qwen3, roberta, rotary_bert, smollm3, t5, vit, whisper),
)
TASKS: tuple[TaskModule, ...] = (
    *(
        causal_lm,
        chat,
        classification,
        denoising,
        embedding,
        image_classification,
        masked_lm,
        multi_label,
        multiple_choice,
        preference,
        question_answering,
        regression,
    ),
    *(
        replaced_token_detection,
        reranking,
        sentence_pairs,
        seq2seq,
        span_corruption,
        speech_to_text,
        token_classification,
    ),
)
EXAMPLES: tuple[type[Examples], ...] = (Split, Cache, Packed)
PROCESSORS: tuple[type[Processor], ...] = (Tokenizer, ImageProcessor, SpeechProcessor)
TEXT_PROCESSORS: tuple[type[TextProcessor], ...] = (Tokenizer,)
HEADS = [(name, head) for name in models.families() for head in models.family(name).HEADS]


def test_all_are_listed() -> None:
    assert [models.family(name) for name in models.families()] == list(FAMILIES)
    assert [tasks.task(name) for name in tasks.tasks()] == list(TASKS)


# ---------------------------------------------------------------------------------------------------------- families


def exported_names(layout: Layout, bare: bool) -> list[str]:
    """What tensors of the first layer are called in a folder."""
    names = [rule.of_layer(rule.theirs, 0) for rule in layout.rules]
    return [name.removeprefix(layout.prefix) for name in names] if bare else names


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_exported_tensors_show_their_head(family: str, head: str | None) -> None:
    module = models.family(family)
    names = exported_names(module.hf_layout(module.TINY, head), bare=head is None)
    shown = head_of(names, module.HEADS)
    if head is not None and not module.HEADS[head].marks:
        return  # config.json alone shows it
    if head is None or shown == head:
        assert shown == head
        return
    if head == "pretraining":  # it has the tensors of the other one, and more
        assert shown == "masked_lm"
        return
    # Heads whose tensors are the same: neither is taken for the other.
    assert shown not in module.HEADS
    alike = [name for name, other in module.HEADS.items() if name and other.marks == module.HEADS[head].marks]
    assert str(shown).split(" or ") == sorted(alike, key=str(shown).split(" or ").index)


@pytest.mark.parametrize(("family", "head"), HEADS)
def test_the_references_class_is_read_as_the_head_that_it_is_written_for(family: str, head: str | None) -> None:
    module = models.family(family)
    names = exported_names(module.hf_layout(module.TINY, head), bare=head is None)
    for kind in module.MODEL_TYPES:
        stated = architecture_of(module, head, kind)
        assert stated in architectures(module)
        # Folders with both heads of pre-training are read as masked language models, unless both are asked for.
        assert head_of_class(module, stated, names) == ("masked_lm" if head == "pretraining" else head)
    told_apart = [(one.suffix, one.marks if one.suffix == "ForPreTraining" else ()) for one in module.HEADS.values()]
    assert len(told_apart) == len(set(told_apart))


def test_no_two_families_claim_a_model_type() -> None:
    assert sum(len(module.MODEL_TYPES) for module in FAMILIES) == len(models.model_types())


@pytest.mark.parametrize("family", models.families())
def test_facts_are_those_of_the_model(family: str) -> None:
    module = models.family(family)
    model: Any = module.Model(module.TINY, None)
    facts = module.facts(module.TINY)
    assert facts == model.facts
    assert set(facts.inputs) <= set(inspect.signature(type(model).__call__).parameters)
    assert set(example_batch(facts, 2)) <= set(facts.inputs)
    shapes, axes = shapes_and_axes(model)
    leaves = leaves_of(shapes, axes)
    for stack in facts.stacks:
        ends = {
            leaf.first_layer + (leaf.layers or 0) for path, leaf in leaves.items() if path.startswith(f"{stack.path}/")
        }
        assert ends == {stack.own}
    assert (facts.vocabulary is None) == (facts.processor == "image")
    if facts.vocabulary is not None:
        assert any(names.axes[0] == "vocab" and names.shape[0] == facts.vocabulary for names in leaves.values())


@pytest.mark.parametrize(("family", "head"), [(f, h) for f, h in HEADS if models.family(f).HEADS[h].classes])
def test_classes_are_of_what_the_head_says(family: str, head: str) -> None:
    module = models.family(family)
    model: Any = module.Model(with_classes(module.TINY, 7), head)
    batch = example_batch(model.facts, 3)
    out = jax.eval_shape(
        lambda params, batch: model.apply({"params": params}, **batch), shapes_and_axes(model)[0], batch
    )
    rows = len(batch[model.facts.reads])
    places = () if module.HEADS[head].classes == "rows" else batch["tokens"].shape[1:]
    assert out.logits.shape == (rows, *places, 7)
    assert out.logits.dtype == np.float32


# ------------------------------------------------------------------------------------------------------------- tasks


def made(name: str) -> Any:
    return tasks.task(name).make_task(
        task_options(name)(name=name),
        Targets(("O", "B-a")[: 1 if name in ("regression", "reranking") else 2], (3, 1)),
        Facts({}, ()),
        stand_in_processor(tasks.task(name)),
    )


@pytest.mark.parametrize("name", tasks.tasks())
def test_a_task_is_a_value_of_a_head_that_a_family_has(name: str) -> None:
    assert hash(made(name)) == hash(made(name))
    assert made(name) == made(name)
    assert any(made(name).head in module.HEADS for module in FAMILIES)
    assert tasks.task_of_head(made(name).head, name, tasks.problem_of(tasks.task(name))) is tasks.task(name)


@pytest.mark.parametrize("name", tasks.tasks())
def test_padding_is_as_declared_and_weighs_nothing(name: str) -> None:
    options = task_options(name)(name=name)
    fields = tasks.task(name).fields(RunConfig(task=options), 9)
    image = dict.fromkeys(("height", "width", "channels", "frames", "bins"), 3)
    shape = Shape(2, (("length", 5), (CLASSES, 2), *image.items(), *tasks.sizes_of(options).items()))
    empty = collate([], fields, shape)
    assert empty.keys() == fields.keys()
    for field, value in empty.items():
        assert (value.shape, value.dtype) == (fields[field].shape(shape), np.dtype(fields[field].dtype))
        assert (value == fields[field].fill).all()
        assert value.shape[0] == 2
    if "tokens" in empty:
        assert (empty["tokens"] == 9).all()
    assert not empty["weights"].any()
    assert float(made(name).weight(made(name).prepare(jax.device_put(empty), jax.random.key(0)))) == 0


@pytest.mark.parametrize("name", tasks.tasks())
def test_what_changes_a_tasks_rows_are_options_of_its_own(name: str) -> None:
    own = {field.name for field in dataclasses.fields(task_options(name))} - {"name"}
    assert set(tasks.task(name).ROW_OPTIONS) <= own


# ------------------------------------------------------------------------------------------------ rows and processors


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_are_alike_wherever_they_lie(kind: type[Examples], tmp_path: Path) -> None:
    rows = [Encoded({"tokens": np.arange(n, dtype=np.int32), "types": np.zeros(n, np.int32)}, n) for n in (3, 1, 2)]
    split = make_split("train", rows, text_fields(9))
    write_cache(tmp_path / "cache", rows, text_fields(9), {}, lambda split: {})
    made: tuple[Examples, ...] = split, open_cache(tmp_path / "cache", "train", text_fields(9)), pack(split, 3)
    (examples,) = (one for one in made if type(one) is kind)
    assert examples.name == "train"
    assert sum(examples.sizes("length")) == 6
    assert len(examples.sizes("length")) == len(examples) == (2 if kind is Packed else 3)
    assert examples.digest() == examples.digest()
    batch = collate([examples[i] for i in range(len(examples))], examples.fields, text_shape(4, 5))
    assert {name: (value.shape[0], value.dtype) for name, value in batch.items()} == {
        name: (4, np.dtype(field.dtype)) for name, field in examples.fields.items()
    }
    assert sorted(batch["tokens"][batch["mask"] == 1].tolist()) == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("kind", TEXT_PROCESSORS)
def test_a_processor_names_its_files_and_no_token_that_they_do_not(kind: Any, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "words")
    found: TextProcessor = kind(tmp_path / "words")
    assert {path.name for path in (tmp_path / "words").iterdir()} <= set(found.files)
    assert found.special == SpecialIds(pad=0, mask=4, first=2, separator=3, unknown=1)
    assert found.special_ids == (0, 2, 3, 4)
    text = (tmp_path / "words/tokenizer.json").read_text()
    (tmp_path / "bare").mkdir()
    for named in ("PAD", "MASK"):
        text = text.replace(f"[{named}]", f"plain-{named}")
    (tmp_path / "bare/tokenizer.json").write_text(text)
    bare: TextProcessor = kind(tmp_path / "bare")
    assert (bare.special.pad, bare.special.mask) == (None, None)
    assert bare.pad_id == 0
    with pytest.raises(UserError, match="the tokenizer has no mask token, which masked_lm needs"):
        masked_lm.make_task(masked_lm.Config(), Targets(), Facts({}, ()), bare)
    assert bare.digest() != found.digest()
    (tmp_path / "copy").mkdir()
    found.save(tmp_path / "copy")
    assert kind(tmp_path / "copy").digest() == found.digest()
