"""The schema of a run: typed, frozen, each default stated once, here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jaxft.machine import compile_cache

DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TaskConfig:
    """What is learnt. Each task adds options of its own (``jaxft/config/tasks``)."""

    name: str = "classification"
    """A module of ``jaxft.tasks``, or the dotted name of one of your own (docs/add_a_task.md)."""

    @property
    def languages(self) -> tuple[str | None, str | None]:
        """Languages that a tokenizer marks texts with, and those that a model writes; None: as its files say."""
        return None, None


def _usual_task() -> TaskConfig:
    from jaxft.config.tasks import task_options

    return task_options(TaskConfig.name)()


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): the weights stay, thin matrices beside them train; merged at export."""

    rank: int | None = None
    """Rank of the adapters. None: no adapters, everything trains."""
    alpha: float = 16.0
    """The adapters' product is scaled by ``alpha / rank``."""
    targets: tuple[str, ...] = ("layers/attention/query/kernel", "layers/attention/value/kernel")
    """Glob patterns over paths of layer kernels that get adapters (``layers/*`` for all). Of an encoder-decoder, ``layers/`` means the
    layers of both, ``encoder/`` and ``decoder/`` those of one."""
    train: tuple[str, ...] | None = None
    """Glob patterns over paths that train beside the adapters. None: the head of labelled tasks, nothing else."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network, from which weights, computed how."""

    init: str | None = None
    """Weights to start from: a folder in Hugging Face layout, ``pkg:PACKAGE/FOLDER`` inside an installed Python package,
    or a hub id ``ORG/NAME``. None: random weights for ``family`` and ``arch``."""
    family: str | None = None
    """A module of ``jaxft.models``, or the dotted name of one of your own. None: read from the config.json of ``init``."""
    arch: dict[str, Any] = field(default_factory=dict)
    """Fields of the family's Config: the whole architecture without ``init``, changes to it with ``init``
    (for instance dropout rates)."""
    head: Literal["task", "fresh"] = "task"
    """``task``: use the head found in ``init`` if it fits the task, else a fresh one, and say so. ``fresh``: always new."""
    reinit_layers: int = 0
    """How many of the last layers of ``init``'s weights are drawn afresh, with the pooler where there is one (Zhang et al. 2020);
    0: none."""
    param_dtype: DType = "float32"
    """Storage type of parameters and of optimizer moments."""
    activation_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of what flows between layers; ``auto`` as for ``matmul_dtype``. Softmax, normalisation statistics and losses are
    float32 in any case."""
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matmul operands; accumulation is always float32. ``auto``: bfloat16 on TPUs and GPUs, float32 on CPUs (whose
    bfloat16 units differ too much to be the default; see docs/performance.md)."""
    gradient_dtype: DType | None = None
    """Type in which gradients of weight matrices leave their products and are summed up over devices; None: as the parameters.
    bfloat16 halves what is sent, and rounds what each device adds to 8 bits. Not for a loss in tiles (``vocab_tile``).
    Micro-batches are added up, and the optimizer computes, in float32 in any case."""
    attention: Literal[
        "auto",
        "xla",
        "native",
        "blockwise",
        "fused",
        "splash",
        "flash",
        "cudnn",
        "jax",
        "tokamax",
        "ring",
        "all_to_all",
        "reference",
    ] = "auto"
    """Backend of attention. ``auto``: the fastest measured one that honours mask, dropout and mesh (docs/attention.md)."""
    dropout_bits: Literal["threefry", "hash"] = "hash"
    """Where the random bits of dropout come from: a hash of counters, made where they are used, or jax's generator, which costs
    more memory and time (docs/attention.md)."""
    layers: Literal["unrolled", "scanned"] = "unrolled"
    """How the stacked layers are computed. The parameter tree is the same for both."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    vocab_tile: int | None = None
    """Vocabulary entries that a language-modelling loss scores at a time, so that logits of all entries are never held
    together (4096 is a good size). None: all at once."""
    remat: Literal["none", "full", "dots", "offload"] = "none"
    """What a layer keeps for its backward pass: everything, only its input, only its matmul results, or only its input and
    that in the memory of the host."""


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from and how they become batches."""

    train: str | tuple[str, ...] | None = None
    """A .csv, .tsv, .jsonl, .json or .parquet file (``.gz`` and ``.zst`` allowed for the text formats), ``tfds:NAME:SPLIT``, or a
    folder saved by the ``datasets`` library as ``hf:FOLDER[:SPLIT]``; a pattern (``part-*.parquet``), a folder of such files, a
    folder of class folders with a text per .txt file, or a list of any of these; or a token cache (``jaxft cache build``), alone;
    or corpora (``jaxft data build``), one or several (docs/data.md)."""
    eval: str | tuple[str, ...] | None = None
    """Held-out rows, same forms. None: ``eval_fraction`` of the training rows is held out (of a token cache, none can be)."""
    eval_fraction: float = 0.1
    test: str | tuple[str, ...] | None = None
    """Rows that are scored once, at the end, with the best parameters, and that nothing is chosen by; same forms. None: none, or a part
    of the training rows, as ``test_fraction`` says."""
    test_fraction: float | None = None
    """Share of the training rows that is held out for the test. None: none is."""
    split_group: str | None = None
    """Column whose values stay together when training rows are held out: rows of one customer, document or query are all trained on, or
    all held out. None: rows are held out one by one, the same share of each label."""
    stratify: bool = True
    """Whether rows are held out so that each part has its share of each label. ``false``: whatever their labels are."""
    header: bool = True
    """Whether the first line of CSV and TSV files names the columns; if not, they are named 0, 1, 2, ..."""
    quotes: Literal["auto", "double", "none"] = "auto"
    """Whether double quotes enclose cells of CSV and TSV files (RFC 4180). ``auto``: yes, but between tabs only if the whole
    file shows it (docs/data.md)."""
    missing_text: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows whose text is missing: an error that names the first one, or they are left out and counted. Missing are
    null and NaN; for ``skip`` also empty and blank texts. ``predict`` answers every row and refuses in any case."""
    missing_label: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows whose label or number is missing (null, NaN, empty or blank): an error that names the first one, or they are
    left out and counted."""
    text: str = "text"
    """Column of the (first) text."""
    text_pair: str | None = None
    """Column of the second text of a pair."""
    image: str = "image"
    """Column of images: paths of files (beside the file that names them), or what such files hold."""
    audio: str = "audio"
    """Column of sounds, likewise."""
    broken_files: Literal["refuse", "skip"] = "refuse"
    """What becomes of rows whose image or sound cannot be decoded: an error that names the first one, or they are left out and counted."""
    label: str = "label"
    """Column of the label. Ignored by ``predict``."""
    labels: tuple[str, ...] | dict[str, str] | None = None
    """Label names in the order of their class ids, or names by label of the data: ``{0: negative, 1: positive}``. None: the order
    stored with ``init`` if its head is kept, else the sorted names found in the training rows (numbers sort as numbers). 1,
    1.0 and "1" are one label, as are true and "True" (jaxft/data/labels.py has the rule)."""
    label_map: dict[str, str | None] | None = None
    """Other names for labels of the data, before anything else looks at them: ``{pos: positive, Positive: positive, unsure: null}``.
    Several labels may become one; rows of a label that is null are left out and counted (of several labels, such a one is taken off
    its rows; of labels of words, which it names without ``B-`` and ``I-``, it becomes ``O``). Labels that it does not name stay as they
    are."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer, or of the preprocessor_config.json that says how images are made. None: what lies beside
    ``model.init``."""
    max_length: int = 128
    """Tokens kept per row, special tokens included. Longer rows are cut as ``long_texts`` says, counted and reported."""
    long_texts: Literal["auto", "truncate", "split", "windows"] = "auto"
    """What becomes of a text beyond ``max_length``: its beginning; several rows (language models); or windows that overlap by
    ``stride`` (tasks that label words, which see each word once, where it has the most context, and question answering, whose
    windows are of the context). ``auto``: windows for those, else the beginning."""
    stride: int | None = None
    """Tokens that a window has in common with the one before. None: a quarter of ``max_length``; for question answering 128, or a
    third of ``max_length`` if that is less."""
    buckets: tuple[int, ...] | None = None
    """Padded lengths that batches may have; the compiled shapes are batch_size x each. None: powers of two from 16 up to
    ``max_length``."""
    packing: Literal["none", "best_fit", "concatenated", "auto"] = "none"
    """``best_fit``: several texts share a row of ``max_length`` tokens, and do not see each other. Every batch then has one shape; of
    labelled texts, ``train.batch_size`` counts texts, which as many rows hold on average. ``auto``: whichever of packing and buckets
    is expected to cost less, with the padding of each said. Of a corpus (``jaxft data build``), ``concatenated``: all documents one
    after the other, cut every ``max_length`` tokens (docs/pretraining_data.md)."""
    mixture: dict[str, tuple[float, ...]] | None = None
    """Weights of several corpora, in the order of ``train``, by the step that they hold from: ``{0: [0.7, 0.3], 5000: [0.5, 0.5]}``.
    None: corpora are read as one."""
    lengths: dict[str, int] | None = None
    """Tokens of a training row of corpora by the step that they hold from, ``{0: 128, 20000: 512, 30000: 8192}``; the last are
    ``max_length``, which the others divide. Batches of shorter rows have as many more of them: a step has as many tokens. None:
    ``max_length`` from the first step on."""
    repeats: float | None = None
    """How often rows of a corpus may be read in a run, at most; a run that would read them more often is refused. None: as often as it
    comes."""
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
    """Steps per factor of ``step_factor`` in the exponential schedule. None: half of all steps (the last rate is then
    ``step_factor`` squared)."""
    decay_fraction: float = 0.1
    """Share of all steps spent in the final decay of warmup_stable_decay."""
    momentum_dtype: DType | None = None
    """Storage type of first moments; None: as the parameters. Updates are computed in float32. Second moments stay as they
    are: in bfloat16 their small steps would be rounded away."""
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
    """Glob patterns over parameter paths (``embed/*``, ``layers/*``, ``layers/0-3/*`` for the first four layers; of an
    encoder-decoder ``encoder/*``, ``decoder/0-3/*``) that do not train."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the parameters, used for evaluation and export. None: off."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one may be -1 (all remaining devices)."""

    data: int = -1
    """Copies of the parameters, each with its share of the batch."""
    fsdp: int = 1
    """Splits parameters, optimizer state and the batch (Rajbhandari et al. 2020, ZeRO stage 3)."""
    tensor: int = 1
    """Splits heads, MLP width and vocabulary (Shoeybi et al. 2019)."""
    context: int = 1
    """Splits the length of rows; attention passes keys and values around a ring (Liu et al. 2023), or exchanges
    stretches of all heads for whole rows of some (``model.attention=all_to_all``)."""
    slices: int = 1
    """Outermost: slices of a pod, or groups of hosts, joined by a slower network; as ``data``."""
    axes: Literal["auto", "explicit"] = "auto"
    """jax's axis types of the mesh: whether shardings are part of array types outside the step."""
    rules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Rows of the table of logical axes (jaxft/parallel/sharding.py) to replace, for instance ``{vocab: []}``."""
    replicate: tuple[str, ...] = ()
    """Glob patterns over paths of large parameters that may lie whole on every device though the mesh splits others."""


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
    batch_ramp: dict[str, int] | None = None
    """Batch sizes by the step that they hold from, ``{0: 32, 1000: 64, 2000: 128}``, for corpora; the last is ``batch_size``. Rates stay
    as ``optim`` says. None: ``batch_size`` from the first step on."""
    accumulation: int = 1
    """Micro-batches per optimizer step; k of them equal one batch of the same rows."""
    seed: int = 0
    """Seed of initial heads, data order and dropout."""
    seeds: tuple[int, ...] = ()
    """Several runs in one command, one sub-folder each, reported as mean +- sd. Replaces ``seed``."""
    log_every: int = 10
    """Steps between log lines."""
    profile: str | None = None
    """``START:STOP``: steps of which a trace is written to ``OUT/profile``, for xprof or TensorBoard. None: none."""
    max_nonfinite: int = 10
    """Steps in a row with a non-finite loss or gradient that are put up with. Such steps change nothing, neither parameters nor the
    learning rate's course."""
    rollbacks: int = 3
    """How often a run goes back to its last checkpoint when there are more of them, and leaves out the batches since then. After that it
    ends (exit code 5), and says which tensors were not finite."""
    spike_skip: float | None = None
    """Standard deviations above the mean of the last 128 steps beyond which a step's loss or gradient norm makes it change nothing, from
    the 64th step on (OLMo 2's rule; there 6). Such steps are counted (``spikes`` in the log). None: off."""
    watchdog: float | None = 60.0
    """Seconds without a step (or twenty times the median step, if that is longer) after which a run counts as hung and ends with exit
    code 70, and ``OUT/hang.txt`` says what its threads were doing. Evaluation, saving and compilation do not count. None: off."""
    compilation_cache: str | None = compile_cache.FOLDER
    """Folder of XLA's persistent compilation cache. None: off."""
    export: bool = True
    """Write the (best) model as a Hugging Face folder at the end, load it back and compare."""


@dataclass(frozen=True)
class EvalConfig:
    """When held-out rows are scored."""

    every: int | None = None
    """Steps between evaluations. None: once per epoch, and at the end in any case."""
    batch_size: int = 64
    metric: str | None = None
    """Metric that names the best checkpoint and stops early. None: the task's first one (a classifier's accuracy, a language
    model's loss). Whether less or more of it is better, the task says."""
    patience: int | None = None
    """Evaluations without a better ``metric`` after which training stops. None: never."""
    stride: int | None = None
    """Where ``jaxft eval`` scores documents of a corpus: tokens that a window of one has in common with the window before. None: half of
    ``data.max_length``."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the full training state is saved."""

    every: int | None = None
    """Steps between checkpoints. None: at each evaluation."""
    keep: int = 2
    """Newest steps kept; the best one by ``eval.metric`` is kept besides."""
    keep_every: int | None = None
    """Steps that are multiples of this are kept besides, for ever. None: none are."""
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
    samples: int = 0
    """Held-out rows, the first ones, that the model writes its text of at each evaluation, to be read: replies of conversations, texts from
    texts. They are shown, kept in ``OUT/samples.jsonl``, and the last ones stand in the report."""
    prompts: tuple[str, ...] = ()
    """Prompts that it goes on with besides; of conversations, what a user says."""
    sample_tokens: int = 64
    """Tokens of a sample at most; the texts of ``seq2seq`` are those that evaluation scores, as long as ``task.generation`` says."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    task: TaskConfig = field(default_factory=_usual_task)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
