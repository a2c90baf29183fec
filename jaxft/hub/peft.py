"""Low-rank adapters as Hugging Face's peft library stores them: adapter_config.json and adapter_model.safetensors.

Source: huggingface/peft, ``LoraConfig``, ``save_pretrained`` and its documentation of the checkpoint format. A module's weight W
[out, in] gains lora_alpha / r * lora_B [out, r] lora_A [r, in]. Of a fused W, the adapters of k of its parts are one of rank k r,
whose lora_B has a block for each.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from jax import Array

from jaxft.files import folder_written_whole, write_atomic
from jaxft.hub.convert import export_tensors
from jaxft.hub.weights import TensorOut, write_safetensors
from jaxft.models.adapters import Adapted
from jaxft.models.contract import Family
from jaxft.models.initial import shapes_and_axes
from jaxft.models.layout import Layout, Rule
from jaxft.trees import Params, branch, nested, paths_of

_PREFIX = "base_model.model."
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
}  # by the end of the reference's class name


def write_adapter(
    target: Path, family: Family, model: Adapted, params: Params, trained: tuple[str, ...], base: str
) -> None:
    """Writes a folder that ``peft.PeftModel.from_pretrained`` loads onto the model that the run started from.

    Args:
      params: ``{"base": ..., "lora": ...}`` on the host; of the base, ``trained`` suffices.
      trained: paths of the base's own parameters that were trained too (a classifier): stored whole.
      base: name or folder of the model that the run started from.

    Raises:
      UserError: ``target`` exists and is not empty.
    """
    layout, bare = family.hf_layout(model.config, model.head), model.head is None
    adapters, own = paths_of(branch(params, "lora")), paths_of(branch(params, "base"))
    adapted = {rule: [path for path in rule.paths if path in model.targets] for rule in layout.rules}
    adapted = {rule: paths for rule, paths in adapted.items() if paths}
    modules = {rule: _module(rule, layout, bare) for rule in adapted}
    shapes = {path: leaf.shape for path, leaf in paths_of(shapes_and_axes(model.base)[0]).items()}
    tensors = [
        out
        for rule in adapted
        for out in _of_rule(
            rule, modules[rule], {p: (adapters[f"{p}/a"], adapters[f"{p}/b"]) for p in adapted[rule]}, shapes
        )
    ]
    whole = Layout(tuple(rule for rule in layout.rules if set(rule.paths) & set(trained)), layout.prefix)
    stored = export_tensors(nested({path: own[path] for path in trained}), whole, bare=bare) if trained else []
    tensors += [TensorOut(_PREFIX + out.name, out.shape, out.dtype, out.read) for out in stored]
    config = {
        "peft_type": "LORA",
        "task_type": next(
            (task for end, task in _TASKS.items() if family.HEADS[model.head].suffix.endswith(end)), None
        ),
        "base_model_name_or_path": base,
        "r": model.rank,
        "lora_alpha": model.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(rule.turned for rule in adapted),
        "inference_mode": True,
        "target_modules": _ends(modules, modules, layout, bare, model),
        **_patterns(adapted, modules, layout, bare, model),
        "modules_to_save": sorted({out.name.rpartition(".")[0] for out in stored}) or None,
    }
    with folder_written_whole(target) as folder:
        write_safetensors(folder, tensors, stem="adapter_model")
        write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def _module(rule: Rule, layout: Layout, bare: bool) -> str:
    """Name of a kernel's module, with ``{layer}`` (and ``{inner}``) in it."""
    name = rule.theirs.removeprefix(layout.prefix) if bare else rule.theirs
    return name.removesuffix(".weight")


def _ends(
    chosen: Collection[Rule], modules: Mapping[Rule, str], layout: Layout, bare: bool, model: Adapted
) -> list[str]:
    """Ends of module names: peft takes every module whose name ends in one of them. What comes after the number of the layer, unless
    modules that are not chosen end so too."""
    names = [modules[rule] for rule in chosen]
    ends = sorted({name.rpartition("}.")[2] for name in names})
    others = {_module(rule, layout, bare) for rule in layout.rules} - set(names)
    if not any(other.endswith(f".{end}") for other in others for end in ends):
        return ends
    layers = sum(stack.own for stack in model.facts.stacks)
    return [name for rule in chosen for name in rule.of_layers(modules[rule], layers)]


def _patterns(
    adapted: Mapping[Rule, list[str]], modules: Mapping[Rule, str], layout: Layout, bare: bool, model: Adapted
) -> dict[str, dict[str, float]]:
    """Ranks and alphas of fused modules with several adapters: k times the usual ones, so that their ratio stays."""
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}
    for number in sorted({len(paths) for paths in adapted.values()} - {1}):
        chosen = [rule for rule, paths in adapted.items() if len(paths) == number]
        ends = _ends(chosen, modules, layout, bare, model)
        ranks |= dict.fromkeys(ends, number * model.rank)
        alphas |= dict.fromkeys(ends, number * model.alpha)
    return {"rank_pattern": ranks, "alpha_pattern": alphas} if ranks else {}


def not_storable(family: Family, model: Adapted, trained: Collection[str]) -> str | None:
    """Why peft cannot hold what was trained; None: it can. A weight is stored whole or has an adapter, a fused one with all its parts."""
    for rule in family.hf_layout(model.config, model.head).rules:
        whole = [path for path in rule.paths if path in trained]
        if whole and len(whole) < len(rule.paths):
            others = ", ".join(path for path in rule.paths if path not in trained)
            return f"{', '.join(whole)} was trained, and is one tensor with {others} there ({rule.theirs})"
    return None


def _of_rule(
    rule: Rule, module: str, pairs: Mapping[str, tuple[Array, Array]], shapes: Mapping[str, tuple[int, ...]]
) -> list[TensorOut]:
    """lora_A and lora_B of each layer, from A [L, inputs.., r] and B [L, r, outputs..] of each adapted part of a weight."""
    whole, places = rule.parts([rule.one(shapes[path]) for path in rule.paths])
    layers, rank = (sizes := next(iter(pairs.values()))[0].shape)[0], sizes[-1]
    dtype = next(iter(pairs.values()))[0].dtype
    of_a, of_b = (np.zeros(shape, dtype) for shape in _stacks(layers, rank * len(pairs), whole))
    for number, (path, (a, b)) in enumerate(pairs.items()):
        pattern = rule.arrangement(len(shapes[path]) - 1)
        split = pattern.ours[: a.ndim - 2], pattern.ours[a.ndim - 2 :]
        # What is ours per input or output, in the order of theirs.
        inputs, outputs = (
            [names.index(name) for name in group] for names, group in zip(split, pattern.theirs[::-1], strict=True)
        )
        ranks = slice(number * rank, (number + 1) * rank)
        of_a[:, ranks] = np.asarray(a).transpose(0, a.ndim - 1, *(1 + i for i in inputs)).reshape(layers, rank, -1)
        rows = slice(*places[rule.paths.index(path)])
        of_b[:, rows, ranks] = np.asarray(b).transpose(0, *(2 + i for i in outputs), 1).reshape(layers, -1, rank)
    return [
        TensorOut(
            f"{_PREFIX}{name}.lora_{letter}.weight",
            stack.shape[1:],
            stack.dtype,
            lambda stack=stack, layer=layer: np.ascontiguousarray(stack[layer]),
        )
        for layer, name in enumerate(rule.of_layers(module, layers))
        for letter, stack in (("A", of_a), ("B", of_b))
    ]


def _stacks(layers: int, rank: int, whole: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    outputs, inputs = whole
    return (layers, rank, inputs), (layers, outputs, rank)
