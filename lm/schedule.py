"""Learning rates as pure functions of the step; nothing is stepped, so nothing can drift when a run resumes."""

import math
from collections.abc import Sequence
from typing import Literal

Schedule = Literal["constant", "cosine", "linear"]


def lr_factor(step: int, total_steps: int, warmup_steps: int, schedule: Schedule, min_lr_ratio: float = 0.0) -> float:
    """What the peak learning rate is multiplied by for update number `step` (0 is the first).

    Linear warm-up that reaches 1 after `warmup_steps` updates and is never 0: the first update has 1 / warmup_steps, or it
    would be wasted. Then constant, or down to `min_lr_ratio` at the last update, along half a cosine (Loshchilov and
    Hutter, arXiv 1608.03983) or a line.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min((step - warmup_steps) / max(total_steps - 1 - warmup_steps, 1), 1.0)
    falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return min_lr_ratio + (1.0 - min_lr_ratio) * falling


def plateau_factor(losses: Sequence[float], factor: float, patience: int) -> float:
    """`factor` to the power of how often the evaluation loss stayed without a new best for more than `patience` evaluations.

    The counting is that of torch's ReduceLROnPlateau with threshold 0, from the logged losses instead of a scheduler's memory.
    """
    best, waited, reductions = math.inf, 0, 0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited > patience:
            reductions, waited = reductions + 1, 0
    return factor**reductions


def evaluations_since_best(losses: Sequence[float]) -> int:
    """How many evaluations ago the lowest loss was first seen (0: the last one is the best)."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0
