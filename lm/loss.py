"""Cross-entropy as a sum, so that one divisor serves all micro-batches and processes of a step."""

import torch
import torch.nn.functional as F

from lm.packing import Batch

MEASURED = ("c4_nats", "c4_targets", "synthetic_nats", "synthetic_targets", "synthetic_right", "synthetic_rows")


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
    # no matrix product: autocast would round it to bfloat16
    return (losses * batch["weights"].flatten()).sum(), _all_finite(logits_RWV), errors[:-1] == 0


def mixed_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed weighted loss of a micro-batch of rows (`lm.mixed_rows`), whether every logit is finite, and `MEASURED`.

    The last is float64 (6,): nats and number of the targets of text; nats and number of the trained targets of synthetic
    rows; how many of these rows have the most likely token right at each target of the answer, EOS included; their number.
    """
    logits_BTV = model(input_ids=batch["input_ids"], use_cache=False).logits
    losses_BT = F.cross_entropy(logits_BTV.float().flatten(0, 1), batch["targets"].flatten(), reduction="none")
    losses_BT = losses_BT.view(batch["targets"].shape)
    trained, synthetic = batch["weights"] > 0, batch["synthetic"]
    nats = torch.where(trained, losses_BT.detach(), 0.0).double().sum(dim=1)
    wrong = ((logits_BTV.detach().argmax(dim=-1) != batch["targets"]) & batch["answer"]).any(dim=1)
    targets = trained.sum(dim=1)
    measured = [nats * ~synthetic, targets * ~synthetic, nats * synthetic, targets * synthetic, ~wrong & synthetic, synthetic]
    sums = torch.stack([values.double().sum() for values in measured])
    return (losses_BT * batch["weights"]).sum(), _all_finite(logits_BTV), sums


def means(sums: dict[str, float]) -> dict[str, float | None]:
    """Means of sums of `MEASURED`: nats per token of text, nats per trained token of synthetic rows, their share of right
    answers; None where there was nothing.
    """

    def mean(total: str, count: str) -> float | None:
        return sums[total] / sums[count] if sums[count] else None

    return {
        "loss_c4": mean("c4_nats", "c4_targets"),
        "loss_synthetic": mean("synthetic_nats", "synthetic_targets"),
        "synthetic_acc": mean("synthetic_right", "synthetic_rows"),
    }


def _all_finite(logits: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(logits.detach())
    return low.isfinite() & high.isfinite()
