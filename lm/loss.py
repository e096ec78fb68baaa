"""Cross-entropy as a sum, so that one divisor serves all micro-batches and processes of a step."""

import torch
import torch.nn.functional as F


def cross_entropy_sum(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss in nats (float32 scalar), and whether every logit is finite (bool scalar); nothing waits for the device.

    The logits have a flag of their own because a -inf at another token than the target leaves the loss finite.
    """
    low, high = torch.aminmax(logits_BTV.detach())
    finite = low.isfinite() & high.isfinite()
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum"), finite
