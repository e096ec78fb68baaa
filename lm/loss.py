"""Cross-entropy as a sum, so that one divisor serves all micro-batches and processes of a step."""

import torch
import torch.nn.functional as F

from lm.packing import Batch


def cross_entropy_sum(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss in nats (float32 scalar), and whether every logit is finite (bool scalar); nothing waits for the device.

    The logits have a flag of their own because a -inf at another token than the target leaves the loss finite.
    """
    loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")
    return loss, _all_finite(logits_BTV)


def packed_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed weighted loss of a packed micro-batch (`lm.packing.pack`), whether every logit is finite, and `correct`.

    `correct` (n,) says of each example whether the most likely token is right at each target of its answer, EOS included.
    """
    logits_RWV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    losses = F.cross_entropy(logits_RWV.float().flatten(0, 1), batch["targets"].flatten(), reduction="none")
    wrong = (logits_RWV.detach().argmax(dim=-1) != batch["targets"]) & batch["answer"]
    errors = torch.zeros(len(batch["lengths"]) + 1, dtype=torch.int64, device=wrong.device)
    errors.index_add_(0, batch["example"].flatten(), wrong.flatten().long())
    return losses @ batch["weights"].flatten(), _all_finite(logits_RWV), errors[:-1] == 0


def _all_finite(logits: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(logits.detach())
    return low.isfinite() & high.isfinite()
