"""Texts that models write, token by token: pure functions over ids, compiled per shape."""

from jaxft.models.decoding.decode import Generated, generate, writes
from jaxft.models.decoding.settings import GenerationConfig

__all__ = ["Generated", "GenerationConfig", "generate", "writes"]
