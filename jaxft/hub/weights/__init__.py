"""Weights files on disk, tensor by tensor: read safetensors, PyTorch and Flax files; write safetensors.

Nothing here imports torch, transformers, flax or jax, and nothing in a weights file is ever executed. Readers check the
whole structure of a file when it is opened, and then read one tensor at a time, so that loading needs about one tensor
of memory above its destination (Flax files excepted, see :mod:`jaxft.hub.weights.flax_file`).
"""

from jaxft.hub.weights.contract import Weights
from jaxft.hub.weights.reader import open_weights
from jaxft.hub.weights.writer import TensorOut, write_safetensors

__all__ = ["TensorOut", "Weights", "open_weights", "write_safetensors"]
