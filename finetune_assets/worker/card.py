"""What the GPU tells while it trains: how busy and how hot it is (NVML, through torch and the package nvidia-ml-py)."""

from __future__ import annotations

from contextlib import suppress

import torch

HOT = 85
"""Degrees Celsius above which cards slow down."""


def facts() -> dict[str, float]:
    """`gpu_percent` and `gpu_celsius`; nothing without a GPU, or where NVML does not answer."""
    if not torch.cuda.is_available():
        return {}
    with suppress(ModuleNotFoundError, RuntimeError, AttributeError):
        return {"gpu_percent": torch.cuda.utilization(), "gpu_celsius": torch.cuda.temperature()}
    return {}
