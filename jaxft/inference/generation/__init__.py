"""Texts that a decoder goes on with."""

from jaxft.config.generation import GenerationConfig
from jaxft.inference.generation.stored import stored_generation
from jaxft.inference.generation.texts import Continuation, Writer
from jaxft.models.decoding.decode import Generated, generate

__all__ = ["Continuation", "Generated", "GenerationConfig", "Writer", "generate", "stored_generation"]
