"""Texts that a decoder goes on with."""

from jaxft.inference.generation.decode import Generated, generate
from jaxft.inference.generation.settings import GenerationConfig, stored_generation
from jaxft.inference.generation.texts import Continuation, Writer

__all__ = ["Continuation", "Generated", "GenerationConfig", "Writer", "generate", "stored_generation"]
