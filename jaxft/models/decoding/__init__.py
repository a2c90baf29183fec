"""Texts that models write, token by token: pure functions over ids, compiled per shape."""

from jaxft.config.generation import GenerationConfig
from jaxft.models.decoding.decode import Generated, generate, write, writes
from jaxft.models.decoding.speculative import Draft, generate_with_draft

__all__ = ["Draft", "Generated", "GenerationConfig", "generate", "generate_with_draft", "write", "writes"]
