"""The fastest attention that model and machine allow: flash-attention 2 on a GPU that has it, one of its own on a CPU.

The latter, for short rows, is two batched products and a softmax, in the precision of the products.

torch's fused kernel is a third slower there (its backward pass took 27 % of a step: d 192, 6 heads, rows of 60 to 270 tokens).
transformers' plain one keeps every score in float32 and scales, masks and casts in passes of their own (a tenth of a step). The
softmax adds up in float32 in either case.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils.import_utils import is_flash_attn_2_available

NAME = "short_rows"
FLASH = "flash_attention_2"
"""It alone keeps documents apart that are laid end to end; bfloat16 only."""
LENGTH = 1024
"""Tokens of a row up to which the scores of a batch are small enough to be kept."""
UNKNOWN = ("attn_logit_softcapping", "attention_sinks", "layer_types")
"""Settings of architectures whose scores are computed otherwise, or differently from layer to layer."""


def short_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax(query · key · scaling + mask) · value; all [batch, heads, tokens, d], the result [batch, tokens, heads, d]."""
    batch, heads, tokens, _ = query.shape
    if key.shape[1] != heads:  # grouped queries
        key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    queries, keys, values = (part.reshape(batch * heads, *part.shape[2:]) for part in (query, key, value))
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    if attention_mask is None:
        scores = torch.bmm(queries * scaling, keys.transpose(1, 2))
    else:
        shape = (batch, heads, *attention_mask.shape[-2:])
        mask = attention_mask.to(query.dtype).expand(shape).reshape(-1, *shape[2:])
        scores = torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=scaling)
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    weights = torch.nn.functional.dropout(weights, options.get("dropout") or 0.0, module.training)
    made = torch.bmm(weights, values).view(batch, heads, tokens, -1)
    return made.transpose(1, 2).contiguous(), None


def choose(model: PreTrainedModel, max_length: int, *, bf16: bool = False) -> None:
    """Sets the fastest attention for rows of at most `max_length` tokens; on a GPU without flash-attention transformers' choice
    stays. `bf16`: whether products are in bfloat16.
    """
    if torch.cuda.is_available():
        if bf16 and is_flash_attn_2_available() and getattr(model, "_supports_flash_attn", False):
            cast("Any", model).set_attn_implementation(FLASH)
        return
    if max_length > LENGTH:
        return
    settings = model.config.get_text_config()
    kinds: list[Any] = [getattr(settings, name, None) for name in UNKNOWN]
    plain = not any(kind for kind in kinds if not isinstance(kind, list) or set(kind) != {"full_attention"})
    supported = bool(getattr(model, "_supports_attention_backend", False))
    cast("Any", model).set_attn_implementation(NAME if plain and supported else "eager")


def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether rows that are laid end to end stay apart."""
    return getattr(model.config.get_text_config(), "_attn_implementation", None) == FLASH


AttentionInterface.register(NAME, short_rows)
AttentionMaskInterface.register(NAME, eager_mask)
