"""The whole configuration of a run: typed, frozen, each default stated once, here.

A run file is YAML; it may ``extends:`` at most two other files (read first, in order), and ``key=value`` pairs from the
command line are applied last. Decoding is strict: an unknown key or a value of the wrong type is a
:class:`~jaxft.errors.UserError` that names the full path. The resolved configuration is itself a loadable run file
(:func:`to_yaml`), and is stored in the run folder and in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from jaxft.errors import UserError, nearest
from jaxft.files import find_file

DType = Literal["float32", "bfloat16"]
T = TypeVar("T")


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt."""

    name: str = "classification"
    """A module of ``jaxft.tasks``."""
    label_smoothing: float = 0.0
    """Share of the target probability spread evenly over all classes (Szegedy et al. 2016)."""
    class_weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """``balanced``: N / (C * count of the class in the training data). Or a weight per label name."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network, from which weights, computed how."""

    init: str | None = None
    """Weights to start from: a folder in Hugging Face layout, ``pkg:PACKAGE/FOLDER`` inside an installed Python package,
    or a hub id ``ORG/NAME``. None: random weights for ``family`` and ``arch``."""
    family: str | None = None
    """A module of ``jaxft.models``. None: read from the config.json of ``init``."""
    arch: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's Config: the whole architecture without ``init``, changes to it with ``init``
    (for instance dropout rates)."""
    head: Literal["task", "fresh"] = "task"
    """``task``: use the head found in ``init`` if it fits the task, else a fresh one, and say so. ``fresh``: always new."""
    param_dtype: DType = "float32"
    """Storage type of parameters and of optimizer moments."""
    activation_dtype: DType = "float32"
    """Type of what flows between layers. Softmax, normalisation statistics and losses are float32 in any case."""
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matmul operands; accumulation is always float32. ``auto``: bfloat16 on TPUs and GPUs, float32 on CPUs (whose
    bfloat16 units differ too much to be the default; see docs/performance.md)."""
    layers: Literal["unrolled", "scanned"] = "unrolled"
    """How the stacked layers are computed. The parameter tree is the same for both."""
    remat: Literal["none", "full", "dots"] = "none"
    """What a layer keeps for its backward pass: everything, only its input, or only its matmul results."""


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches."""

    train: str | None = None
    """A .csv, .tsv, .jsonl or .parquet file (``.gz`` allowed for the text formats), ``tfds:NAME:SPLIT``, or a folder saved by
    the ``datasets`` library as ``hf:FOLDER[:SPLIT]``."""
    eval: str | None = None
    """Held-out rows, same forms. None: ``eval_fraction`` of the training rows is held out."""
    eval_fraction: float = 0.1
    text: str = "text"
    """Column of the (first) text."""
    text_pair: str | None = None
    """Column of the second text of a pair."""
    label: str = "label"
    """Column of the label. Ignored by ``predict``."""
    labels: tuple[str, ...] | None = None
    """Label names in the order of their class ids. None: the order stored with ``init`` if its head is kept, else the sorted
    names found in the training rows (numbers sort as numbers)."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer. None: the one beside ``model.init``."""
    max_length: int = 128
    """Tokens kept per row, special tokens included. Longer rows are truncated, counted and reported."""
    buckets: tuple[int, ...] | None = None
    """Padded lengths that batches may have; the compiled shapes are batch_size x each. None: powers of two from 16 up to
    ``max_length``."""
    read_ahead: int = 4
    """Batches prepared before they are needed."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    name: Literal["adamw", "adam", "sgd", "momentum", "nesterov", "adafactor", "lion", "muon"] = "adamw"
    learning_rate: float = 5e-5
    """Peak rate, reached after warm-up."""
    schedule: Literal[
        "constant", "linear", "cosine", "polynomial", "step", "exponential", "inverse_sqrt", "warmup_stable_decay"
    ] = "linear"
    warmup_steps: int | None = None
    """Steps of linear warm-up from 0. None: ``warmup_fraction`` of all steps."""
    warmup_fraction: float = 0.1
    end_factor: float = 0.0
    """Last rate as a share of the peak (linear, cosine, polynomial, exponential, warmup_stable_decay)."""
    power: float = 2.0
    """Exponent of the polynomial schedule."""
    step_fractions: tuple[float, ...] = (0.5, 0.75)
    """Where the step schedule drops, as shares of all steps."""
    step_factor: float = 0.1
    """What each drop of the step schedule, or each ``exponential_steps`` of the exponential one, multiplies the rate by."""
    exponential_steps: int | None = None
    """Steps per factor of ``step_factor`` in the exponential schedule. None: a tenth of all steps."""
    decay_fraction: float = 0.1
    """Share of all steps spent in the final decay of warmup_stable_decay."""
    weight_decay: float = 0.01
    """Decoupled decay, on parameters with two or more logical axes besides ``layers``: no biases, no norm scales."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.9
    """For momentum, nesterov and muon."""
    clip_norm: float | None = 1.0
    """Global gradient norm above which gradients are scaled down."""
    layer_decay: float = 1.0
    """Rate multiplier per layer below the top one (ELECTRA, BEiT); 1: off."""
    freeze: tuple[str, ...] = ()
    """Glob patterns over parameter paths (``embed/*``, ``layers/*``, ``layers/0-3/*`` for the first four layers) that do not train."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the parameters, used for evaluation and export. None: off."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one may be -1 (all remaining devices)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class TrainConfig:
    """How long, how much at once, and where results go."""

    out: str = "runs/run"
    """Run folder: resolved config, log, checkpoints, report and exported model."""
    epochs: float | None = 3.0
    """Passes over the training rows; ignored when ``steps`` is given."""
    steps: int | None = None
    batch_size: int = 32
    """Rows per optimizer step, over all devices and accumulation steps."""
    accumulation: int = 1
    """Micro-batches per optimizer step; k of them equal one batch of the same rows."""
    seed: int = 0
    """Of initial heads, data order and dropout."""
    seeds: tuple[int, ...] = ()
    """Several runs in one command, one sub-folder each, reported as mean +- sd. Replaces ``seed``."""
    log_every: int = 10
    """Steps between log lines."""
    max_nonfinite: int = 10
    """Steps in a row with a non-finite loss or gradient after which the run stops. Such steps change nothing."""
    compilation_cache: str | None = "~/.cache/jaxft/xla"
    """Folder of XLA's persistent compilation cache. None: off."""
    export: bool = True
    """Write the (best) model as a Hugging Face folder at the end, load it back and compare."""


@dataclass(frozen=True)
class EvalConfig:
    """When held-out rows are scored."""

    every: int | None = None
    """Steps between evaluations. None: once per epoch, and at the end in any case."""
    batch_size: int = 64
    metric: str = "accuracy"
    """Metric that names the best checkpoint and stops early."""
    mode: Literal["max", "min"] = "max"
    patience: int | None = None
    """Evaluations without a better ``metric`` after which training stops. None: never."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the full training state is saved."""

    every: int | None = None
    """Steps between checkpoints. None: at each evaluation."""
    keep: int = 2
    """Newest steps kept; the best one by ``eval.metric`` is kept besides."""
    resume: Literal["auto", "never"] = "auto"
    """``auto``: go on from the newest valid checkpoint in ``train.out``. ``never``: refuse a folder that has any."""
    verify: bool = True
    """Check the hash of every file before a checkpoint is believed."""


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides the console and log.jsonl, which are always written."""

    tensorboard: bool = False
    """TensorBoard event files in the run folder (needs the ``tensorboardX`` package)."""
    wandb: str | None = None
    """Weights & Biases project name (needs the ``wandb`` package)."""
    progress: Literal["auto", "on", "off"] = "auto"
    """Live progress bar; ``auto``: when the console is a terminal."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number (YAML 1.1 wants ``1.0e-4``) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from error


def _read_tree(path: Path, depth: int = 0) -> dict[str, Any]:
    """The merged tree of a YAML file and of what it extends."""
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config file: {error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a config file holds `section: {{key: value}}`, this one holds a {type(tree).__name__}"
        )
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or len(parents) > 2 or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: `extends:` takes one or two file names")
    if parents and depth == 4:
        raise UserError(f"{path}: `extends:` goes deeper than 4 files; is it circular?")
    merged: dict[str, Any] = {}
    for parent in parents:
        found = path.parent / parent
        if not found.is_file():
            raise UserError(f"{path}: extends {parent!r}, but there is no file {found}")
        merged = _merge(merged, _read_tree(found, depth + 1))
    return _merge(merged, tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    """``tree`` with one dotted ``key=value`` applied; the value is read as YAML."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment!r}: expected key=value, for instance optim.learning_rate=1e-4")
    value = _parse_yaml(text, assignment)
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(tree, value)


def decode(schema: type[T], tree: Any, where: str = "") -> T:
    """A dataclass of type ``schema`` from a plain tree.

    Raises:
      UserError: an unknown key (with the nearest valid one), or a value of the wrong type, each with its full path.
    """
    from pydantic import TypeAdapter, ValidationError  # costs 0.1 s: not for `jaxft --help`

    _check_keys(schema, tree, where)
    try:
        # JSON mode: strict about scalars, yet a list may fill a tuple.
        return TypeAdapter(schema).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join([where, *(str(part) for part in problem["loc"])]).strip(".")
        shown = json.dumps(problem["input"], default=str)
        raise UserError(f"{path}={shown}: {problem['msg'].lower()}") from error


def _check_keys(schema: Any, tree: Any, where: str) -> None:
    if not dataclasses.is_dataclass(schema):
        return
    if not isinstance(tree, dict):
        raise UserError(f"{where or 'config'}: expected keys and values, found {tree!r}")
    types = typing.get_type_hints(schema)
    for key, value in tree.items():
        path = f"{where}.{key}".strip(".")
        if key not in types:
            raise UserError(f"unknown config key {path!r}: {nearest(str(key), types)}")
        _check_keys(types[key], value, path)


def load_config(path: str | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The resolved configuration of a run file (or of the defaults, for None) with ``key=value`` overrides applied.

    Raises:
      UserError: missing or malformed file, unknown key, value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_tree(find_file(path, "config file"))
    for assignment in overrides:
        tree = _override(tree, assignment)
    config = decode(RunConfig, tree)
    _check_ranges(config)
    return config


def _check_ranges(config: RunConfig) -> None:
    """Refuses values that no run can use, before anything is read or computed."""
    optim, train, data, ev = config.optim, config.train, config.data, config.eval
    rules = [
        (train.batch_size > 0, "train.batch_size", train.batch_size, "must be at least 1"),
        (train.accumulation > 0, "train.accumulation", train.accumulation, "must be at least 1"),
        (
            train.batch_size % max(train.accumulation, 1) == 0,
            "train.accumulation",
            train.accumulation,
            f"must divide train.batch_size={train.batch_size}",
        ),
        (train.steps is not None or train.epochs is not None, "train.epochs", None, "give train.epochs or train.steps"),
        (train.steps is None or train.steps > 0, "train.steps", train.steps, "must be at least 1"),
        (
            train.steps is not None or train.epochs is None or train.epochs > 0,
            "train.epochs",
            train.epochs,
            "must be above 0",
        ),
        (train.log_every > 0, "train.log_every", train.log_every, "must be at least 1"),
        (len(set(train.seeds)) == len(train.seeds), "train.seeds", list(train.seeds), "has a seed twice"),
        (min((train.seed, *train.seeds)) >= 0, "train.seed", train.seed, "seeds must not be negative"),
        (ev.batch_size > 0, "eval.batch_size", ev.batch_size, "must be at least 1"),
        (ev.every is None or ev.every > 0, "eval.every", ev.every, "must be at least 1"),
        (ev.patience is None or ev.patience > 0, "eval.patience", ev.patience, "must be at least 1"),
        (
            config.checkpoint.every is None or config.checkpoint.every > 0,
            "checkpoint.every",
            config.checkpoint.every,
            "must be at least 1",
        ),
        (config.checkpoint.keep > 0, "checkpoint.keep", config.checkpoint.keep, "must be at least 1"),
        (data.max_length > 2, "data.max_length", data.max_length, "must leave room for text beside special tokens"),
        (0 < data.eval_fraction < 1, "data.eval_fraction", data.eval_fraction, "must lie between 0 and 1"),
        (
            data.buckets is None or (len(data.buckets) > 0 and min(data.buckets) > 0),
            "data.buckets",
            data.buckets,
            "must name positive lengths",
        ),
        (
            data.buckets is None or max(data.buckets, default=0) >= data.max_length,
            "data.buckets",
            data.buckets,
            f"must reach data.max_length={data.max_length}",
        ),
        (
            data.labels is None or len(set(data.labels)) == len(data.labels),
            "data.labels",
            data.labels,
            "has a label twice",
        ),
        (data.read_ahead > 0, "data.read_ahead", data.read_ahead, "must be at least 1"),
        (optim.learning_rate >= 0, "optim.learning_rate", optim.learning_rate, "must not be negative"),
        (0 <= optim.warmup_fraction <= 1, "optim.warmup_fraction", optim.warmup_fraction, "must lie in 0..1"),
        (
            optim.warmup_steps is None or optim.warmup_steps >= 0,
            "optim.warmup_steps",
            optim.warmup_steps,
            "must not be negative",
        ),
        (0 <= optim.decay_fraction <= 1, "optim.decay_fraction", optim.decay_fraction, "must lie in 0..1"),
        (0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "must lie in 0..1"),
        (0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "must lie in 0..1"),
        (
            optim.clip_norm is None or optim.clip_norm > 0,
            "optim.clip_norm",
            optim.clip_norm,
            "must be above 0 (null: off)",
        ),
        (0 < optim.layer_decay <= 1, "optim.layer_decay", optim.layer_decay, "must lie in 0..1"),
        (optim.ema is None or 0 < optim.ema < 1, "optim.ema", optim.ema, "must lie between 0 and 1"),
        (0 <= config.task.label_smoothing < 1, "task.label_smoothing", config.task.label_smoothing, "must lie in 0..1"),
        (
            all(size == -1 or size > 0 for size in dataclasses.astuple(config.mesh)),
            "mesh",
            dataclasses.asdict(config.mesh),
            "sizes must be positive, one may be -1",
        ),
    ]
    for holds, key, value, problem in rules:
        if not holds:
            raise UserError(f"{key}={value}: {problem}")


def to_tree(config: Any) -> dict[str, Any]:
    """A config dataclass as plain dicts and lists, JSON- and YAML-ready."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML; loading it gives the same configuration."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True, width=120)
