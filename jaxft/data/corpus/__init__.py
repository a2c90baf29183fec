"""Corpora: texts tokenised once (``jaxft data build``) into flat files, which language models read through memory maps."""
