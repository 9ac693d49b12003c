"""Seeded generator of synthetic Spanish conversations: the committed sample and the general dialogues of the base model."""
