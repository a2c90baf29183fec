"""What an unknown key was probably meant to be: names that other libraries have for ours, and names in another section."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator

from jaxft.config.schema import TaskConfig
from jaxft.config.tasks import task_options, tasks_with_options
from jaxft.errors import nearest

_OURS = {
    "data.eval": "dev_file eval eval_file val_file valid_file validation_file eval_data val_data",
    "data.test": "test test_data test_file",
    "data.label": "label_column label_column_name label_field label_key target_column",
    "data.max_length": "max_len max_seq_len max_seq_length maxlen model_max_length seq_len seq_length sequence_length",
    "data.text": "text_column text_column_name text_field text_key",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "data.train": "data data_path dataset dataset_name train train_data train_file train_path training_data",
    "checkpoint.every": "save_every save_steps",
    "checkpoint.keep": "save_total_limit",
    "eval.batch_size": "eval_batch_size per_device_eval_batch_size per_gpu_eval_batch_size",
    "eval.every": "eval_every eval_steps",
    "eval.metric": "metric_for_best_model",
    "eval.patience": "early_stopping early_stopping_patience",
    "log.wandb": "report_to wandb_project",
    "model.init": "base_model from_pretrained model model_name model_name_or_path model_path pretrained pretrained_model",
    "model.lora.alpha": "lora_alpha",
    "model.lora.rank": "lora_r lora_rank",
    "model.lora.targets": "lora_target_modules target_modules",
    "model.matmul_dtype": "bf16 fp16 mixed_precision precision",
    "model.remat": "activation_checkpointing gradient_checkpointing",
    "optim.beta1": "adam_beta1",
    "optim.beta2": "adam_beta2",
    "optim.clip_norm": "clip_grad clip_grad_norm grad_clip gradient_clip_val max_grad_norm",
    "optim.eps": "adam_eps adam_epsilon epsilon",
    "optim.learning_rate": "lr max_lr peak_lr base_lr",
    "optim.name": "optim optimizer",
    "optim.schedule": "lr_schedule lr_scheduler lr_scheduler_type scheduler",
    "optim.warmup_fraction": "warmup_proportion warmup_ratio",
    "optim.warmup_steps": "lr_warmup_steps num_warmup_steps warmup",
    "optim.weight_decay": "wd",
    "task.name": "task",
    "task.label_smoothing": "label_smoothing_factor",
    "train.accumulation": "accumulation_steps grad_accum grad_accumulation gradient_accumulation "
    "gradient_accumulation_steps",
    "train.batch_size": "batch bs batchsize per_device_batch_size per_device_train_batch_size per_gpu_train_batch_size "
    "train_batch_size",
    "train.epochs": "epoch max_epochs n_epochs num_epochs num_train_epochs",
    "train.log_every": "log_steps logging_steps",
    "train.out": "out_dir output output_dir output_path save_dir",
    "train.steps": "max_steps num_steps num_train_steps num_training_steps total_steps",
}
_MEANT = {theirs: ours for ours, names in _OURS.items() for theirs in names.split()}


def keys_of(schema: object, prefix: str = "") -> Iterator[str]:
    """Every key of a config dataclass, in full; of the section of tasks, those that any task has."""
    for name, kind in typing.get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if kind is TaskConfig:
            options = map(task_options, tasks_with_options())
            yield from dict.fromkeys(key for one in options for key in keys_of(one, f"{prefix}{name}."))
        elif dataclasses.is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{name}.")


def meant(root: object, path: str, siblings: typing.Iterable[str]) -> str:
    """The tail of an "unknown key" message.

    Args:
      root: the dataclass that ``path`` starts in.
      siblings: valid names where the last part of ``path`` stands.
    """
    keys, last, siblings = list(keys_of(root)), path.rsplit(".", 1)[-1], list(siblings)
    if path.count(".") and path in keys:
        if path.partition(".")[0] not in siblings:
            return f"another task has it; this one has {', '.join(siblings)}"
        # a file: `train.steps: 3`
        section, _, name = path.rpartition(".")
        return f"write {section}: {{{name}: ...}}"
    ours = _MEANT.get(last.lower().replace("-", "_"))
    if ours in keys:
        return f"did you mean {ours!r}?"
    if difflib.get_close_matches(last, siblings, n=1, cutoff=0.6):
        return nearest(last, siblings)
    elsewhere = [repr(key) for key in keys if "." in key and key.rsplit(".", 1)[1] == last]
    return f"did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(last, siblings)
