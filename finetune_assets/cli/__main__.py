"""`python -m finetune_assets.cli`."""

from finetune_assets.cli import main

main()
