"""Cases of weights: families and heads x formats x types x damages, each against `transformers` on torch.

What is compared: the folder that `jaxft convert` writes, computed by jaxft and by transformers, and what jaxft computes from
the source itself, with what transformers computes from the source. Where transformers does not read the source (Flax files,
names that it does not know), the truth is the undamaged model.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zoo.case import Case

TRUE = "the model as it was made"
DECODER_BIAS = "the model as it was made, with the bias that its decoder uses"
FOLDER = "the folder, by transformers"


DECODER_BIASES = ("cls.predictions.decoder.bias", "cls.predictions.bias")


def _truth(model: str, folder: Path, against: str, changes: dict[str, Any]) -> Any:
    """The reference's model; raises what transformers raises, or ValueError where it would make numbers up."""
    import torch
    import transformers

    from zoo import folders

    made = folders.made(model)
    kind = getattr(transformers, made.architecture)
    extra = {"add_pooling_layer": False} if model == "bert-no-pooler" else {}
    if against != FOLDER:
        config = kind.config_class.from_dict(made.config | changes)
        reference = kind(config, **extra)
        reference.load_state_dict(made.tensors, strict=False)
        reference.tie_weights()
        if against == DECODER_BIAS:
            decoder = reference.cls.predictions.decoder
            decoder.bias.data.copy_(next(made.tensors[n] for n in DECODER_BIASES if n in made.tensors))
        return reference.eval()
    reference, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **extra)
    if report["missing_keys"]:
        raise ValueError(f"makes up {sorted(report['missing_keys'])}")
    return reference.eval()


def _computed(reference: Any, batch: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import torch

    inputs = {
        "input_ids": torch.tensor(batch["tokens"].astype(np.int64)),
        "attention_mask": torch.tensor(batch["mask"]),
    }
    if "types" in batch:
        inputs["token_type_ids"] = torch.tensor(batch["types"].astype(np.int64))
    if type(reference).__name__.endswith("MultipleChoice"):
        inputs = {name: value[:, None] for name, value in inputs.items()}
    with torch.no_grad():
        out = reference(**inputs, output_hidden_states=True)
    found = {"hidden states": out.hidden_states[-1].numpy()}
    if hasattr(out, "start_logits"):
        found["logits"] = torch.stack([out.start_logits, out.end_logits], -1).numpy()
    for name in ("logits", "prediction_logits"):
        if getattr(out, name, None) is not None:
            found["logits"] = getattr(out, name).numpy()
    if "logits" in found and found["logits"].shape == batch["tokens"].shape:  # one number for each token
        found["logits"] = found["logits"][..., None]
    if "logits" not in found and getattr(out, "pooler_output", None) is not None:
        found["pooled"] = out.pooler_output.numpy()
    return found


def _jaxft(folder: Path, architecture: str | None = None) -> tuple[str, Any, Callable[[Any], dict[str, Any]]]:
    """(architecture, facts, batch -> outputs) of a folder, by jaxft."""
    from jaxft.hub import parity
    from jaxft.hub.pretrained import load_params
    from jaxft.hub.source import open_source
    from jaxft.layers import Compute
    from jaxft.models.contract import architecture_of

    source = open_source(str(folder), lambda text: None)
    model = source.family.Model(source.config, source.head, Compute())
    params = load_params(source, model, lambda text: None)
    architecture = architecture_of(source.family, source.head, source.model_type)
    return architecture, model.facts, lambda batch: parity.outputs(model, params, batch)


def _convert(folder: Path, target: Path) -> str:
    """What `jaxft convert` prints."""
    from jaxft.cli import convert

    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        convert.run(parser.parse_args([str(folder), str(target)]))
    return printed.getvalue()


def judge(model: str, folder: Path, against: str, changes: dict[str, Any]) -> str | None:
    """None where all agree within the tolerance, else what does not."""
    from jaxft.errors import UserError
    from jaxft.hub import parity
    from jaxft.models.example import example_batch
    from zoo import folders

    target = folder.with_name(folder.name + ".converted")
    _convert(folder, target)
    stored = folders.made(model).architecture
    try:
        architecture, facts, from_target = _jaxft(target)
    except UserError as error:
        return f"jaxft does not read what it wrote: {error}"
    # The masked-LM half of it, by design.
    same = {f"{stem}ForPreTraining": f"{stem}ForMaskedLM" for stem in ("Bert", "Albert")}
    if architecture != same.get(stored, stored):
        return f"a {stored} was taken for a {architecture}"
    batch = example_batch(facts, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = _computed(_truth(model, folder, against, changes), batch)
        except Exception as error:  # noqa: BLE001 - whatever stops the reference
            return f"jaxft reads it, transformers does not: {type(error).__name__} {str(error).splitlines()[:1]}"
        try:
            again = _again(target, architecture, batch)
        except UserError as error:
            return f"what was written: {error}"
    found = {
        "converted, by jaxft": from_target(batch),
        "converted, by transformers": again,
        "source, by jaxft": _jaxft(folder)[2](batch),
    }
    for who, values in found.items():
        if values.keys() != wanted.keys():
            return f"{who}: {sorted(values)} instead of {sorted(wanted)}"
        for name, value in values.items():
            if value.shape != wanted[name].shape:
                return f"{who}: {name} has shape {value.shape} instead of {wanted[name].shape}"
        for got in parity.compare(values, wanted, batch["mask"], who):
            if not got.passed:
                return f"{got.name} differs by {got.largest:.2e} of {got.scale:.2e}"
    return None


def _again(target: Path, architecture: str, batch: dict[str, Any]) -> dict[str, Any]:
    from jaxft.hub import parity

    reference = parity.load_reference(target, architecture)
    if reference.made_up and not any("pooler" in name for name in reference.made_up):
        raise AssertionError(f"the written folder lacks {reference.made_up}")
    found = _computed(reference.model, batch)
    if any("pooler" in name for name in reference.made_up):
        found.pop("pooled")
    return found


def case(
    name: str,
    kind: str,
    model: str,
    *,
    config: dict[str, Any] | str | None = None,
    drop: tuple[str, ...] = (),
    tensors: Iterable[Callable[[Any], Any]] = (),
    format: str = "safetensors",
    damage: Callable[[Path], None] | None = None,
    against: str = FOLDER,
    expect: str = "equal",
    says: str = "",
    quick: bool = False,
) -> Case:
    """A model, stored with changes.

    Args:
      config: changes to config.json, or its whole text.
      drop: keys to leave out of config.json.
      tensors: changes to the tensors, one after the other.
      format: of the weights.
      damage: done to the written folder.
      against: TRUE or FOLDER: what is right.
    """

    def make(folder: Path) -> None:
        from zoo import folders

        made = folders.made(model)
        stored = dict(made.tensors)
        for change in tensors:
            stored = change(stored)
        folders.FORMATS[format](folder, stored)
        tree = made.config | (config if isinstance(config, dict) else {})
        text: Any = config if isinstance(config, str) else {k: v for k, v in tree.items() if k not in drop}
        folders.write_config(folder, text)
        if damage is not None:
            damage(folder)

    changes = {k: v for k, v in config.items() if k == "tie_word_embeddings"} if isinstance(config, dict) else {}
    return Case(name, kind, make, lambda folder: judge(model, folder, against, changes), expect, says, quick)


def cases() -> Iterable[Case]:
    """Every case of weights."""
    yield from _families_and_formats()
    yield from _types()
    yield from _damaged_tensors()
    yield from _old_names()
    yield from _ties()
    yield from _decoder_biases()
    yield from _rotary()
    yield from _configs()


def _families_and_formats() -> Iterable[Case]:
    from zoo.folders import FORMATS, MODELS

    quick = {("bert-mlm", "safetensors"), ("bert-classes", "bin"), ("llama-lm", "sharded"), ("bert-nsp", "msgpack")}
    few = ("llama", "llama-lm")
    for model, (_, _, known) in MODELS.items():
        bert = model.startswith("bert")
        for format in FORMATS:
            if not bert and (format == "msgpack" or (format != "safetensors" and model not in few)):
                continue
            yield case(
                f"{model}/{format}",
                f"format {format}",
                model,
                format=format,
                against=TRUE if format == "msgpack" else FOLDER,
                expect="equal" if known and format != "bin-legacy" else "either",
                quick=(model, format) in quick,
            )


def _types() -> Iterable[Case]:
    from zoo.folders import as_type

    models = ("bert-mlm", "bert-classes", "llama-lm", "llama-lm-tied")
    for model in models:
        for kind in ("bfloat16", "float16", "float64", "mixed", "float8_e4m3fn", "int8", "one-int8"):
            for format in ("safetensors", "bin"):
                if kind == "float8_e4m3fn" and format == "bin":
                    continue
                coded = "int8" in kind
                yield case(
                    f"{model}/{format}/{kind}",
                    f"type {kind}",
                    model,
                    tensors=[as_type(kind)],
                    format=format,
                    expect="refused" if coded else "equal",
                    says="not floating-point" if coded else "",
                    quick=(model, format) == ("bert-classes", "safetensors")
                    and kind in ("float64", "mixed", "one-int8"),
                )


def _tensor_damages(model: str) -> dict[str, tuple[Callable[[Any], Any], str, str]]:
    """name -> (change, expectation, what a refusal says)."""
    import torch

    from zoo import folders

    extra = torch.ones(2, 2)
    table = "embed_tokens.weight" if model.startswith("llama") else "word_embeddings.weight"
    return {
        "layer tensor missing": (
            lambda t: {n: x for n, x in t.items() if n != folders.some_matrix(t)},
            "refused",
            "missing",
        ),
        "embedding missing": (folders.without(table), "refused", "missing"),
        "extra tensor": (lambda t: t | {"adapter.weight": extra}, "either", ""),
        "wrong shape": (lambda t: t | {folders.some_matrix(t): extra}, "refused", "mis-shaped"),
        "a layer too few": (lambda t: {n: x for n, x in t.items() if ".1." not in n}, "refused", "missing"),
        "a layer too many": (lambda t: t | {n.replace(".1.", ".2."): x for n, x in t.items()}, "either", ""),
        "NaN": (folders.filled(float("nan")), "equal", ""),
        "infinity": (folders.filled(float("inf")), "equal", ""),
        "columns first": (
            lambda t: {n: x.T.contiguous().T if x.ndim == 2 else x for n, x in t.items()},
            "equal",
            "",
        ),
    }


def _damaged_tensors() -> Iterable[Case]:
    from zoo import folders

    quick = {"layer tensor missing", "NaN", "file cut short"}
    for model, format in itertools.product(("bert", "bert-classes", "bert-mlm", "llama-lm"), ("safetensors", "bin")):
        where, fast = f"{model}/{format}", (model, format) == ("bert-classes", "safetensors")
        for name, (change, expect, says) in _tensor_damages(model).items():
            options: dict[str, Any] = {"expect": expect, "says": says, "quick": fast and name in quick}
            yield case(f"{where}/{name}", f"damage: {name}", model, tensors=[change], format=format, **options)
        for name, damage in {"file cut short": folders.cut_short, "file empty": folders.emptied}.items():
            options = {"expect": "refused", "quick": fast and name in quick}
            yield case(f"{where}/{name}", f"damage: {name}", model, damage=damage, format=format, **options)
        for prefix in ("module.", "model.", "_orig_mod."):
            rename = folders.renamed(functools.partial(operator.add, prefix))
            options = {"against": TRUE, "expect": "either"}
            yield case(
                f"{where}/{prefix}", "damage: names with a prefix", model, tensors=[rename], format=format, **options
            )


def _old_names() -> Iterable[Case]:
    import torch

    from zoo import folders

    old, kind = folders.renamed(folders.old_norm_name), "old names"

    def both(difference: float) -> Callable[[Any], Any]:
        def change(tensors: Any) -> Any:
            again = {n: t + difference for n, t in tensors.items() if n.endswith("LayerNorm.weight")}
            return tensors | {folders.old_norm_name(n): t for n, t in again.items()}

        return change

    def with_more(more: dict[str, Any]) -> Callable[[Any], Any]:
        return lambda tensors: tensors | more

    positions = with_more({"bert.embeddings.position_ids": torch.arange(32)[None]})
    inverse = with_more({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)})
    for model, format in itertools.product(("bert-mlm", "bert-classes", "bert-nsp"), ("safetensors", "bin")):
        options: dict[str, Any] = {"format": format, "against": TRUE}
        where, fast = f"{model}/{format}", (model, format) == ("bert-mlm", "bin")
        yield case(f"{where}/gamma", kind, model, tensors=[old], quick=fast, **options)
        yield case(f"{where}/gamma and weight", kind, model, tensors=[both(0.0)], **options)
        options |= {"expect": "refused", "says": "gamma"}
        yield case(f"{where}/gamma and another weight", kind, model, tensors=[both(0.5)], quick=fast, **options)
        yield case(f"{where}/position_ids", kind, model, tensors=[positions], format=format)
    for format in ("safetensors", "bin"):
        yield case(f"llama-lm/{format}/inv_freq", kind, "llama-lm", tensors=[inverse], format=format)


def _ties() -> Iterable[Case]:
    from zoo import folders

    families = {
        "bert-mlm": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        "llama-lm": ("model.embed_tokens.weight", "lm_head.weight"),
    }
    old, new = "cls.predictions.bias", "cls.predictions.decoder.bias"
    for model, (table, decoder) in families.items():
        contents: dict[str, Callable[[Any], Any]] = {
            "absent": folders.without(decoder),
            "equal": lambda t, table=table, decoder=decoder: t | {decoder: t[table].clone()},
            "different": lambda t, table=table, decoder=decoder: t | {decoder: t[table] * 0.7 + 0.1},
            "alone": lambda t, table=table, decoder=decoder: folders.without(table)(t) | {decoder: t[table]},
        }
        for tied, content, format in itertools.product((True, False, None), contents, ("safetensors", "bin")):
            flag = model.startswith("bert") if tied is None else tied
            bad = not flag and content in ("absent", "alone")
            # What an untied model of transformers 5 stores.
            untied = not flag and model.startswith("bert")
            bias: list[Any] = [lambda t: t | {new: t[old].clone()}] if untied else []
            yield case(
                f"{model}/{format}/tied {tied}, decoder {content}",
                "tied flag and decoder",
                model,
                config={} if tied is None else {"tie_word_embeddings": tied},
                drop=("tie_word_embeddings",) if tied is None else (),
                tensors=[contents[content], *bias],
                format=format,
                expect="refused" if bad else "equal",
                says="" if not bad else "lack" if content == "absent" and model == "llama-lm" else "missing",
                quick=format == "safetensors" and tied is not None and content in ("different", "absent"),
            )


def _decoder_biases() -> Iterable[Case]:
    from zoo import folders

    old, new = "cls.predictions.bias", "cls.predictions.decoder.bias"

    def one(tensors: Any) -> Any:
        return next(tensors[n] for n in DECODER_BIASES if n in tensors)

    biases: dict[str, Callable[[Any], dict[str, Any]]] = {
        "old name": lambda b: {old: b},
        "new name": lambda b: {new: b},
        "both, equal": lambda b: {old: b.clone(), new: b.clone()},
        "both, different": lambda b: {old: b * 0.5 + 1, new: b.clone()},
        "none": lambda b: {},
    }
    for model, name in itertools.product(("bert-mlm", "bert-mlm-untied"), biases):
        # Untied with the old name only is what transformers 4 stored; version 5 makes the bias zero.
        known = model == "bert-mlm" and name != "new name"
        yield case(
            f"{model}/decoder bias, {name}",
            "decoder bias",
            model,
            tensors=[lambda t, made=biases[name]: folders.without(old, new)(t) | made(one(t))],
            against=FOLDER if known else DECODER_BIAS,
            expect="refused" if name == "none" else "equal",
        )


def _rotary() -> Iterable[Case]:
    from zoo.folders import LLAMA3

    old = ("rope_parameters",)
    linear = {"type": "linear", "factor": 2.0}
    short = {"original_max_position_embeddings": 16}
    good: dict[str, dict[str, Any]] = {
        "nothing": {},
        "theta": {"rope_theta": 500.0},
        "theta, whole number": {"rope_theta": 500},
        "linear, v4": {"rope_scaling": linear, "rope_theta": 500.0},
        "linear, v4.45": {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        "linear, v5": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0}},
        "linear, both": {
            "rope_scaling": linear,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0},
        },
        "default, both": {"rope_scaling": linear, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        "empty v4, v5": {
            "rope_scaling": {},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0},
        },
        "null v4, v5": {
            "rope_scaling": None,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5.0},
        },
        "theta at the top, v5 without": {"rope_theta": 50.0, "rope_parameters": {"rope_type": "default"}},
        "theta at the top, v5 with another": {
            "rope_theta": 50.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        },
        "theta in v4": {"rope_theta": 50.0, "rope_scaling": {**linear, "rope_theta": 5.0}},
        "v5 null": {"rope_theta": 50.0, "rope_parameters": None},
        "llama3, v4": {"rope_scaling": {**LLAMA3, **short}, "rope_theta": 500.0},
        "llama3, v5": {"rope_parameters": {**LLAMA3, **short, "rope_theta": 500.0}},
        "llama3 without original length": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
        "llama3, v5, without original length": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
        "llama3, original length at the top": {"rope_scaling": LLAMA3, **short},
        "llama3, two original lengths": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}, **short},
        "llama3 and type": {"rope_scaling": {**LLAMA3, "type": "linear"}},
        "factor without a type": {"rope_scaling": {"factor": 2.0}},
        "default with a factor": {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
        "linear below 1": {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "false": {"rope_scaling": False},
    }
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "linear without a factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        "linear, factor null": ({"rope_scaling": {"type": "linear", "factor": None}}, "factor"),
        "linear, factor zero": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        "linear, factor text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        "theta zero": ({"rope_theta": 0.0}, "rope_theta"),
        "theta text": ({"rope_theta": "1e4"}, "rope_theta"),
        "theta null": ({"rope_theta": None}, "rope_theta"),
        "text": ({"rope_scaling": "linear"}, "rope_scaling"),
        "yarn": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        "type null": ({"rope_scaling": {"type": None, "factor": 2.0}}, "None"),
        "type a list": ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "linear"),
        "unknown": ({"rope_scaling": {"type": "mrope"}}, "mrope"),
        "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        **{
            f"llama3 without {key}": ({"rope_scaling": {k: v for k, v in LLAMA3.items() if k != key}}, key)
            for key in ("factor", "low_freq_factor", "high_freq_factor")
        },
    }
    fast = ("linear, both", "llama3 without original length")
    for name, config in good.items():
        drop = () if "rope_parameters" in config else old
        yield case(f"llama-lm/{name}", "rotary settings", "llama-lm", config=config, drop=drop, quick=name in fast)
    for name, (config, says) in bad.items():
        yield case(
            f"llama-lm/{name}", "rotary settings", "llama-lm", config=config, drop=old, expect="refused", says=says,
            quick=name == "linear without a factor",
        )  # fmt: skip


def _configs() -> Iterable[Case]:
    kind = "config.json"
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    for model in ("bert-classes", "bert-mlm", "llama-lm"):
        quick = model == "bert-classes"
        for drop in (("model_type",), ("architectures",), ("model_type", "architectures")):
            yield case(f"{model}/no {' or '.join(drop)}", kind, model, drop=drop, against=TRUE, expect="either")
        yield case(
            f"{model}/quantised",
            kind,
            model,
            config=quantised,
            expect="refused",
            says="quantization_config",
            quick=quick,
        )
        yield case(f"{model}/not JSON", kind, model, config="{", expect="refused", says="not valid JSON")
        yield case(f"{model}/a list", kind, model, config="[]", expect="refused")
        yield case(f"{model}/empty", kind, model, config="{}", expect="refused")
        yield case(f"{model}/missing", kind, model, damage=lambda f: (f / "config.json").unlink(), expect="refused")
        yield case(f"{model}/torch_dtype", kind, model, config={"torch_dtype": "float16", "dtype": "bfloat16"})
        yield case(f"{model}/unknown keys", kind, model, config={"my_key": {"a": [1, None]}, "use_cache": False})
        yield case(f"{model}/auto_map", kind, model, config={"auto_map": {"AutoModel": "mine.Mine"}})
    absurd: dict[str, list[Any]] = {
        "hidden_size": [0, -16, "16", None, 17, 10**12, 16.0],
        "num_hidden_layers": [0, -1, 1, 3, None, True],
        "num_attention_heads": [0, 3, None, 4],
        "vocab_size": [0, 63, 10**9],
        "max_position_embeddings": [0, 16, 10**9],
        "hidden_act": ["unknown", None, ["gelu"], "gelu_new", "silu"],
        "layer_norm_eps": [0.0, -1.0, "1e-12", None, 1e-3],
        "hidden_dropout_prob": [2.0, -0.5, None, 0],
        "pad_token_id": [-1, 64, None, 5],
        "type_vocab_size": [0, 3],
        "initializer_range": [0.0, -1.0, None],
        "position_embedding_type": ["relative_key", "absolute", None],
        "num_labels": [5, 2, None, "3"],
        "id2label": [
            {"0": "a"},
            {"0": "a", "1": "b", "2": "c"},
            {"0": "a", "2": "b"},
            {"x": "a"},
            None,
            ["a", "b", "c"],
        ],
        "problem_type": ["single_label_classification", "unknown", None],
        "is_decoder": [True, None],
        "architectures": [["BertForMaskedLM"], "BertForSequenceClassification", None, []],
        "model_type": ["roberta", "unknown", None, 7, "BERT"],
    }
    for key, values in absurd.items():
        for value in values:
            # Labels as transformers reads them: they must fit the classifier, or only their names are wrong.
            against = TRUE if key in ("num_labels", "id2label", "architectures", "model_type", "is_decoder") else FOLDER
            drop = ("id2label", "label2id") if key == "num_labels" else ()
            yield case(
                f"bert-classes/{key}={value!r}", "absurd value", "bert-classes", config={key: value}, drop=drop,
                against=against, expect="either", quick=(key, value) in (("hidden_size", "16"), ("num_labels", 5)),
            )  # fmt: skip
    for key, value in {
        "num_key_value_heads": 3, "head_dim": 7, "rms_norm_eps": -1.0, "hidden_act": "gelu", "attention_bias": True,
        "mlp_bias": None, "max_position_embeddings": 4, "num_hidden_layers": 5, "intermediate_size": 33,
    }.items():  # fmt: skip
        yield case(f"llama-lm/{key}={value!r}", "absurd value", "llama-lm", config={key: value}, expect="either")
