"""The loss of the targets alone, without what it does not need: a batch's common beginning is computed once, and logits only
where a target follows.

Chats of one assistant begin alike (the system prompt), and few of their tokens are targets. The beginning is computed as one row
whose keys and values every row of the batch attends to, as in a server's prefix cache, and gradients flow back into it from all
of them: loss and gradient are those of the whole rows, up to rounding.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import torch

from finetune_assets.training.tokens import IGNORED

SHORTEST = 16
"""Tokens of a beginning below which a pass of its own costs more than it saves."""
LOGITS = 2**28
"""Most numbers in the logits of a micro-batch (1 GiB in float32): beyond it TRL's loss, which works in chunks, takes over."""
CLOSE = 0.02
"""Relative difference of the two ways of computing a batch's loss that rounding to bfloat16 explains."""


def fits(inputs: dict[str, Any], vocabulary: int) -> bool:
    """Whether the batch is padded (not laid end to end) and the logits of its targets are few enough."""
    return "attention_mask" in inputs and int((inputs["labels"][:, 1:] != IGNORED).sum()) * vocabulary <= LOGITS


def common_beginning(ids: torch.Tensor, labels: torch.Tensor) -> int:
    """Tokens with which every row begins, none of them a target and none before one; 0 where they are few."""
    if ids.shape[0] < 2:
        return 0
    same = (ids == ids[:1]).all(dim=0) & (labels == IGNORED).all(dim=0)
    alike = int(same.cumprod(dim=0).sum()) - 1
    return alike if alike >= SHORTEST else 0


def nats(model: Any, head: torch.nn.Module, inputs: dict[str, torch.Tensor], share: bool) -> torch.Tensor:
    """Sum of the targets' losses in a padded batch (input_ids, attention_mask, labels). `head`: the model's output layer.

    `share`: the common beginning is computed once. Only for a model that attends to keys and values that it is given.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
    begin = common_beginning(ids, labels) if share else 0
    follows = torch.nn.functional.pad(labels[:, begin + 1 :] != IGNORED, (0, 1))
    chosen = torch.zeros((1, begin), dtype=torch.bool, device=ids.device) if begin else follows

    def choose(_head: Any, hidden: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (hidden[0][chosen], *hidden[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        if begin:
            past = model(input_ids=ids[:1, :begin], use_cache=True).past_key_values
            past.batch_repeat_interleave(ids.shape[0])
            chosen = follows
            places = torch.arange(begin, ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
            made = model(input_ids=ids[:, begin:], attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True)
        else:
            made = model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    wanted = labels[:, begin + 1 :][follows[:, :-1]]
    return torch.nn.functional.cross_entropy(made.logits.float(), wanted, reduction="sum")


@torch.no_grad()
def can_share(model: Any, head: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> bool:
    """Tries both ways on a batch, without dropout: not every architecture keeps keys and values as attention needs them."""
    training = model.training
    model.eval()
    try:
        whole, shared = (float(nats(model, head, inputs, share)) for share in (False, True))
    except Exception as error:  # whatever a foreign architecture raises; memory is another matter
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "memory" in str(error):
            raise
        return False
    finally:
        model.train(training)
    return abs(shared - whole) <= CLOSE * abs(whole)
