"""Texts that models write, token by token: pure functions over ids, compiled per shape."""

from jaxft.config.generation import GenerationConfig
from jaxft.models.decoding.decode import Generated, generate, write, writes

__all__ = ["Generated", "GenerationConfig", "generate", "write", "writes"]
