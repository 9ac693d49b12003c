"""No network: set before anything imports huggingface_hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
