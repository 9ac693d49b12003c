"""Corpus: sources, validation, personal data, near-duplicates, and the stored weeks of conversations, feedback and examples."""

from finetune_assets.corpus.schema import CODE_VERSIONS

__all__ = ["CODE_VERSIONS"]
