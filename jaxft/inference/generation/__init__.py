"""Texts that a decoder goes on with."""

from jaxft.inference.generation.stored import stored_generation
from jaxft.inference.generation.texts import Continuation, Writer
from jaxft.models.decoding.decode import Generated, generate
from jaxft.models.decoding.settings import GenerationConfig

__all__ = ["Continuation", "Generated", "GenerationConfig", "Writer", "generate", "stored_generation"]
