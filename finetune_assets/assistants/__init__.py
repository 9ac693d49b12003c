"""Assistants: what one model is trained for. One YAML file each, typed here, with defaults for everything but `select`."""

from finetune_assets.assistants.load import assistant_names, load_assistant, own_contacts, own_regions
from finetune_assets.assistants.settings import Assistant

__all__ = ["Assistant", "assistant_names", "load_assistant", "own_contacts", "own_regions"]
