"""Texts that a decoder goes on with."""

from jaxft.config.generation import GenerationConfig
from jaxft.inference.generation.stored import stored_generation
from jaxft.inference.generation.texts import Continuation, Writer
from jaxft.models.decoding.decode import Generated, generate
from jaxft.models.decoding.speculative import Draft, generate_with_draft

__all__ = [
    "Continuation",
    "Draft",
    "Generated",
    "GenerationConfig",
    "Writer",
    "generate",
    "generate_with_draft",
    "stored_generation",
]
