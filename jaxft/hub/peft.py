"""Low-rank adapters as Hugging Face's peft library stores them: adapter_config.json and adapter_model.safetensors.

Source: huggingface/peft, ``LoraConfig``, ``save_pretrained`` and its documentation of the checkpoint format. A module's weight W
[out, in] gains lora_alpha / r * lora_B [out, r] lora_A [r, in].
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from jaxft.files import folder_written_whole, write_atomic
from jaxft.hub.convert import export_tensors
from jaxft.hub.weights import TensorOut, write_safetensors
from jaxft.models.adapters import Adapted
from jaxft.models.contract import Family
from jaxft.models.layout import Layout, Rule
from jaxft.trees import nested, paths_of

_PREFIX = "base_model.model."
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
}  # by the end of the reference's class name


def write_adapter(
    target: Path, family: Family, model: Adapted, params: Any, trained: tuple[str, ...], base: str
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
    adapters, own = paths_of(params["lora"]), paths_of(params["base"])
    rules = {rule.ours: rule for rule in layout.rules}
    pairs = [(rules[path], adapters[f"{path}/a"], adapters[f"{path}/b"]) for path in model.targets]
    tensors = [out for rule, a, b in pairs for out in _of_pair(_module(rule, layout, bare), rule, a, b)]
    whole = Layout(tuple(rules[path] for path in trained), layout.prefix)
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
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _targets([_module(rule, layout, bare) for rule, _, _ in pairs], layout, bare, model),
        "modules_to_save": sorted({out.name.rpartition(".")[0] for out in stored}) or None,
    }
    with folder_written_whole(target) as folder:
        write_safetensors(folder, tensors, stem="adapter_model")
        write_atomic(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def _module(rule: Rule, layout: Layout, bare: bool) -> str:
    """Name of a kernel's module, with ``{layer}`` in it."""
    name = rule.theirs.removeprefix(layout.prefix) if bare else rule.theirs
    return name.removesuffix(".weight")


def _targets(modules: list[str], layout: Layout, bare: bool, model: Adapted) -> list[str]:
    """Ends of module names: peft takes every module whose name ends in one of them. What comes after the number of the layer, unless
    other modules end so too."""
    ends = sorted({module.rpartition("{layer}.")[2] for module in modules})
    others = {_module(rule, layout, bare) for rule in layout.rules} - set(modules)
    if not any(other.endswith(f".{end}") for other in others for end in ends):
        return ends
    return [
        module.format(layer=layer)
        for module in modules
        for layer in range(sum(stack.layers for stack in model.facts.stacks))
    ]


def _of_pair(module: str, rule: Rule, a: Any, b: Any) -> list[TensorOut]:
    """lora_A and lora_B of each layer, from A [L, inputs.., r] and B [L, r, outputs..]."""
    left, right = (side.split() for side in re.sub(r"\(([^)]*)\)", _joined, rule.pattern or "o i -> i o").split("->"))
    inputs, outputs = right[: a.ndim - 2], right[a.ndim - 2 :]
    theirs_out, theirs_in = (group.replace("_", " ") for group in left)
    of_a = np.asarray(rearrange(np.asarray(a), f"l {' '.join(inputs)} r -> l r ({theirs_in})"))
    of_b = np.asarray(rearrange(np.asarray(b), f"l r {' '.join(outputs)} -> l ({theirs_out}) r"))
    return [
        TensorOut(
            f"{_PREFIX}{module.format(layer=layer)}.lora_{letter}.weight",
            stack.shape[1:],
            stack.dtype,
            lambda stack=stack, layer=layer: np.ascontiguousarray(stack[layer]),
        )
        for layer in range(a.shape[0])
        for letter, stack in (("A", of_a), ("B", of_b))
    ]


def _joined(group: re.Match[str]) -> str:
    return "_".join(group[1].split())
