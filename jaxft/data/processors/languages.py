"""The language that a model writes, where its tokenizer marks texts with languages."""

from __future__ import annotations

import dataclasses

from jaxft.config.generation import GenerationConfig
from jaxft.data.processors.contract import TextProcessor
from jaxft.errors import UserError
from jaxft.files import present, read_json_object


def written_in_its_language(
    generation: GenerationConfig, tokenizer: TextProcessor, *, anew: bool = False
) -> GenerationConfig:
    """Settings that make a model write the language of the tokenizer's targets: its token comes first or, where targets end with it, is
    what the decoder begins with. As they are where texts are not marked with languages.

    Args:
      anew: whatever the settings say already.
    """
    language = tokenizer.language
    if language is None:
        return generation
    before, behind = tokenizer.target.around
    if language in before and (anew or generation.forced_bos_token_id is None):
        return dataclasses.replace(generation, forced_bos_token_id=language)
    if language in behind and (anew or generation.decoder_start_token_id is None):
        return dataclasses.replace(generation, decoder_start_token_id=language)
    return generation


def check_language(tokenizer: TextProcessor) -> None:
    """Raises UserError if texts are marked with their languages, and nothing says what that of targets is; or if a tokenizer puts a
    language's token beside texts without knowing of languages: that of sources would stand beside targets."""
    if tokenizer.marks_languages:
        if tokenizer.language is None:
            raise UserError(
                f"{tokenizer.folder}: its tokenizer marks texts with their languages, and names none for targets; set "
                "task.target_language (and task.source_language)"
            )
        return
    path = tokenizer.folder / "tokenizer_config.json"
    settings = read_json_object(path) if present(path) else {}
    source, target = settings.get("src_lang"), settings.get("tgt_lang")
    if source is not None and source != target:
        raise UserError(
            f"{path}: src_lang={source!r}, tgt_lang={target!r}: targets would be given the token of the source's language, since "
            f"tokenizer_class={settings.get('tokenizer_class')!r} knows of none; name the class that does"
        )
