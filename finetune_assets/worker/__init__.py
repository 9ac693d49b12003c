"""The child process: `python -m finetune_assets.worker SPEC.json`. The only folder that imports torch, transformers and trl."""
