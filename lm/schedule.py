"""Learning rates as pure functions of the step; nothing is stepped, so nothing can drift when a run resumes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["constant", "cosine", "linear", "one_cycle", "wsd", "gpt3"]
BASE_BETA1, MAX_BETA1 = 0.85, 0.95  # of one-cycle: Smith, arXiv 1803.09820, section 4.3, and torch's OneCycleLR


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate between 0 and 1 times its peak at every update; past the last one it stays as it was there.

    Linear warm-up that reaches the peak after `warmup_steps` updates and is never 0: the first update has 1 / warmup_steps,
    or it would be wasted. Then, by `name`,

        constant   the peak
        cosine     half a cosine down to `min_lr_ratio` at the last update (Loshchilov and Hutter, arXiv 1608.03983)
        linear     a line, likewise; with min_lr_ratio 0 it is "linear to zero"
        wsd        warm-up, stable, decay (Hu et al., arXiv 2404.06395): the peak, and over the last `decay_share` of the steps
                   a line down to `min_lr_ratio` (the linear cooldown of Hägele et al., arXiv 2405.18392)
        gpt3       counted in tokens (Brown et al., arXiv 2005.14165, appendix B): warm-up over `warmup_tokens`, half a cosine
                   down to `min_lr_ratio` (.1 there) when `decay_tokens` were trained on, and that from then on
        one_cycle  torch's OneCycleLR (Smith and Topin, arXiv 1708.07120), which warms up by itself and has its own last value

    Attributes:
        total_steps: updates of the whole run.
        warmup_steps, min_lr_ratio: at least 0; in [0, 1]. Not for one_cycle.
        pct_start: in [0, 1], the share of the steps in which one_cycle rises.
        div_factor, final_div_factor: at least 1: one_cycle's peak over its first, and its first over its last learning rate.
        three_phase: one_cycle is back at its first learning rate as long after the peak as it took to reach it.
        cycle_momentum: whether `beta1` mirrors one_cycle.
        decay_share: in [0, 1].
        tokens_per_step, warmup_tokens, decay_tokens: at least 1, 0, and 1.
    """

    name: ScheduleName
    total_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False
    cycle_momentum: bool = False
    decay_share: float = 0.1
    tokens_per_step: int = 1
    warmup_tokens: int = 375_000_000
    decay_tokens: int = 260_000_000_000

    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by for update number `step` (0 is the first)."""
        if self.name == "one_cycle":
            first = 1.0 / self.div_factor
            return self._anneal(step, first, 1.0, first / self.final_div_factor)
        last = max(self.total_steps - 1, 0)
        now, unit, start, end = min(step, last), 1, self.warmup_steps, last
        if self.name == "gpt3":
            now, unit, start, end = now * self.tokens_per_step, self.tokens_per_step, self.warmup_tokens, self.decay_tokens
        if now < start:
            return min((now + unit) / start, 1.0)
        if self.name == "constant":
            return 1.0
        if self.name == "wsd":
            start = max(start, last - round(self.decay_share * self.total_steps))
        progress = min(max(now - start, 0) / max(end - start, 1), 1.0)
        falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.name in ("cosine", "gpt3") else 1.0 - progress
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * falling

    def beta1(self, step: int) -> float | None:
        """The first beta, or momentum, of update number `step`, low where the learning rate is high; None leaves it alone."""
        if self.name != "one_cycle" or not self.cycle_momentum:
            return None
        return self._anneal(step, MAX_BETA1, BASE_BETA1, MAX_BETA1)

    def _anneal(self, step: int, first: float, peak: float, last: float) -> float:
        """From `first` to `peak` to `last` along half cosines, in three phases by way of `first` again.

        The ends of the phases, which lie between two updates, are those of torch's OneCycleLR. It divides by zero where the
        first phase is the first update alone; here that update has the peak.
        """
        top, end = self.pct_start * self.total_steps - 1, self.total_steps - 1
        phases = [(0.0, top, first, peak), (top, end, peak, last)]
        if self.three_phase:
            phases[1:] = [(top, 2 * top, peak, first), (2 * top, end, first, last)]
        step = min(step, max(end, 0))
        begin, stop, low, high = next((phase for phase in phases if step <= phase[1]), phases[-1])
        progress = (step - begin) / (stop - begin) if stop > begin else 1.0
        return high + (low - high) / 2.0 * (math.cos(math.pi * progress) + 1)


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
