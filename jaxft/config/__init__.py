"""The whole configuration of a run.

A run file is YAML; it may ``extends:`` at most two other files (read first, in order), and ``key=value`` pairs from the
command line are applied last. Decoding is strict: an unknown key or a value of the wrong type is a
:class:`~jaxft.errors.UserError` that names the full path. The resolved configuration is itself a loadable run file
(:func:`to_yaml`), and is stored in the run folder and in every checkpoint.
"""

from jaxft.config.decode import decode, flat, to_tree, to_yaml, to_yaml_line
from jaxft.config.read import load_config, run_config, with_overrides
from jaxft.config.schema import (
    CheckpointConfig,
    DataConfig,
    DType,
    EvalConfig,
    LogConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "DType",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "TaskConfig",
    "TrainConfig",
    "decode",
    "flat",
    "load_config",
    "run_config",
    "to_tree",
    "to_yaml",
    "to_yaml_line",
    "with_overrides",
]
