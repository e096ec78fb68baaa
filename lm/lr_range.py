"""The learning-rate range test (Smith, arXiv 1506.01186): the loss while the learning rate rises, and what it suggests.

As in fastai (github.com/fastai/fastai, `lr_find`): every step has a higher rate, the losses are smoothed by a bias-corrected
exponential average, and the test ends once that average is several times its minimum. The model is put back afterwards.
"""

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from lm import draws
from lm.step import LossSum, train_step

LAST_LEFT_OUT = 5  # points of the end that suggest nothing, as in fastai; of the beginning it is a tenth of the steps
FEWEST = 10  # points between these, to suggest from
FEWEST_STEPS = 20  # of a test
CLEARLY = 5.0  # standard errors by which the smoothed loss must fall; noise alone does that in about 1 % of tests at most


@dataclass(frozen=True)
class Suggestions:
    """Learning rates to train with, or why there are none."""

    steepest: float | None = None  # where the smoothed loss falls fastest with the logarithm of the learning rate
    valley: float | None = None  # in the middle of its longest descent
    minimum_tenth: float | None = None  # a tenth of where it is lowest
    refusal: str | None = None  # why there is none
    warning: str | None = None  # why not to trust them


@dataclass(frozen=True)
class Curve:
    """What a range test saw: an entry for each update that was made, all of them finite."""

    lrs: list[float]
    losses: list[float]  # before the update, nats per unit of weight
    grad_norms: list[float]  # before clipping
    stopped: str | None  # why it ended before the last rate


def rates(lo: float, hi: float, count: int) -> np.ndarray:
    """`count` learning rates from `lo` to `hi`, both included, each the same multiple of the one before."""
    return np.geomspace(lo, hi, count)


def smooth(losses: Sequence[float], beta: float) -> np.ndarray:
    """The exponential average after each loss, divided by 1 - beta^t for number t = 1, 2, ...: the first is the first loss.

    The correction is that of Adam (Kingma and Ba, arXiv 1412.6980). With beta^(t + 1) in its place, as it is in Lightning 2.1,
    a flat curve would begin at about half its height and rise.
    """
    average, smoothed = 0.0, []
    for t, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta**t))
    return np.array(smoothed)


def suggest(lrs: Sequence[float], losses: Sequence[float], num_steps: int, beta: float) -> Suggestions:
    """Three learning rates from the smoothed losses, or why this curve, of a test of `num_steps` steps, suggests none."""
    first = num_steps // 10
    if (needed := first + FEWEST + LAST_LEFT_OUT) > len(losses):
        return Suggestions(
            refusal=f"the loss diverged after {len(losses)} steps of {num_steps}, {needed} are needed: lower --min_lr, or raise"
            " --num_steps"
        )
    losses, smoothed = np.array(losses), smooth(losses, beta)
    kept = slice(first, len(losses) - LAST_LEFT_OUT)
    start, lowest = float(smoothed[max(first, 1) - 1]), float(smoothed[kept].min())
    needed = CLEARLY * _standard_error(losses[: max(first, FEWEST)], beta)
    if start - lowest <= needed:
        return Suggestions(
            refusal=f"the smoothed loss never fell clearly (from {start:.4g} to {lowest:.4g} at the lowest; more than"
            f" {needed:.2g} less is needed to be no noise): raise --max_lr if it did not rise at the end, else"
            " --effective_batch or --num_steps, or look at the model and the data"
        )
    lrs, losses, smoothed, all_made = np.array(lrs)[kept], losses[kept], smoothed[kept], len(losses) == num_steps
    steepest, lowest_at = int(np.gradient(smoothed, np.log(lrs)).argmin()), int(smoothed.argmin())
    found = {"steepest": lrs[steepest], "valley": lrs[valley(smoothed)], "minimum_tenth": lrs[lowest_at] / 10}
    found, warning = {name: float(lr) for name, lr in found.items()}, None
    if too_high := [name for name, lr in found.items() if lr > (own := lrs[losses.argmin()])]:
        warning = (
            f"the losses themselves were lowest at {own:.2g}, which the smoothed ones follow late: {' and '.join(too_high)}"
            f" {'is' if len(too_high) == 1 else 'are'} too high, take another suggestion or lower --smoothing"
        )
    elif all_made and lowest_at == len(lrs) - 1:
        warning = "the smoothed loss was lowest at the end: raise --max_lr, what is suggested may be too low"
    return Suggestions(**found, warning=warning)


def _standard_error(first: np.ndarray, beta: float) -> float:
    """Of the difference between the mean of the `first` losses and the smoothed loss much later, if they were all alike.

    Their noise is taken from the differences between successive ones, so that a trend does not count as noise.
    """
    noise = math.sqrt(np.mean(np.diff(first) ** 2) / 2)
    return noise * math.sqrt(1 / len(first) + (1 - beta) / (1 + beta))


def valley(losses: Sequence[float]) -> int:
    """The index in the middle of the longest descent, as fastai's `valley` finds it.

    The descent is a longest strictly falling subsequence; what lies between its members does not matter. It ends at the first
    index at which one of that length ends. As in fastai its start is counted back from there by its length, not where its
    first member is: members that lie scattered in the flat part before the descent move the middle only by their number.
    """
    longest = np.ones(len(losses), dtype=np.int64)  # that ends at each index
    losses = np.asarray(losses)
    for i in range(1, len(losses)):
        longest[i] += longest[:i][losses[:i] > losses[i]].max(initial=0)
    end = int(longest.argmax())
    start = end - int(longest[end])
    section = (end - start) / 3
    return max(0, start + int(section) + int(section / 2))


@contextmanager
def put_back(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Weights, optimizer, loss scale and torch's generators are afterwards, also after an error, what they are now."""
    scaler = accelerator.scaler
    tensors = [*model.parameters(), *model.buffers()]
    weights = [tensor.detach().clone() for tensor in tensors]
    state, scale = copy.deepcopy(optimizer.state_dict()), scaler and scaler.state_dict()
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, weight in zip(tensors, weights, strict=True):
                    tensor.copy_(weight)
            optimizer.load_state_dict(state)
            optimizer.zero_grad()
            if scaler is not None:
                scaler.load_state_dict(scale)


def range_test(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterator[tuple[Sequence[Any], float]],
    loss_sum: LossSum,
    lrs: Sequence[float],
    max_grad_norm: float,
    beta: float,
    diverged: float,
    seed: int,
) -> Curve:
    """Make one step at each learning rate until the loss diverges; what it trains is put back as it was.

    All processes see the same losses, and so stop at the same step.

    Args:
        model, optimizer: as `accelerator.prepare` gave them.
        steps: this process's micro-batches of each step, on the device, and their weight (`lm.step.train_step`).
        max_grad_norm: 0 clips nothing.
        beta: of the smoothing.
        diverged: the test ends when the smoothed loss is more than this times its minimum.
        seed: of dropout, which is that of a run with this seed.
    """
    every = 0.5 if sys.stderr.isatty() else 5.0  # a bar on a terminal, a line every five seconds in a log
    bar = tqdm(total=len(lrs), unit="step", mininterval=every, maxinterval=every, disable=not accelerator.is_main_process)
    losses, grad_norms, stopped = [], [], None
    with put_back(accelerator, model, optimizer), bar:
        for step, lr in enumerate(lrs):
            micro_batches, weight = next(steps)
            torch.manual_seed(draws.torch_seed(seed, step, accelerator.process_index))
            clip = max_grad_norm or math.inf
            result = train_step(accelerator, model, optimizer, micro_batches, loss_sum, weight, float(lr), clip)
            if not result.applied:
                stopped = f"step {step + 1} had a loss or gradient that is not finite"
                break
            losses.append(result.loss)
            grad_norms.append(result.grad_norm)
            bar.set_postfix_str(f"lr {lr:.2e} loss {result.loss:.4g}", refresh=False)
            bar.update()
            smoothed = smooth(losses, beta)
            if smoothed[-1] > diverged * smoothed.min():
                stopped = f"the smoothed loss was more than {diverged:g} times its minimum"
                break
    return Curve([float(lr) for lr in lrs[: len(losses)]], losses, grad_norms, stopped)
