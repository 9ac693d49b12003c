"""The code location, loaded once for all tests: Dagster's load context keeps the first instance it has seen."""

from finetune_assets.definitions import defs

DEFINITIONS = defs()
DEFINITIONS.get_repository_def()
