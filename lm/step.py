"""One exact optimizer step: the gradient of one objective, however it is split, and an update that is whole or not made."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from lm.fsdp import is_sharded, local, whole
from lm.optim import set_beta1
from lm.profiling import part

LossSum = Callable[[torch.nn.Module, Any], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every process, but for `faults`."""

    applied: bool  # False: something was not finite, and no weight or moment changed on any process
    loss: float  # nats per unit of weight over the whole step, before the update
    grad_norm: float  # L2 norm of the whole gradient before clipping
    grad_norm_clipped: float  # and after
    param_norm: float  # L2 norm of all parameters before the update
    faults: tuple[str, ...]  # this process's tensors that were not finite, by name
    outcomes: tuple[torch.Tensor, ...]  # what `loss_sum` gave beyond the loss, one for each micro-batch of this process


@dataclass(frozen=True)
class Unread:
    """What one step leaves on the device."""

    numbers: torch.Tensor  # float64 (4,): how many tensors are not finite, loss, norm of the gradient, of the parameters
    losses: torch.Tensor  # of this process's micro-batches
    finite_logits: torch.Tensor  # of these
    grad_norm: torch.Tensor
    grad_norms: list[torch.Tensor]  # of each parameter that has a gradient, or of this process's part of it
    parameters: list[torch.nn.Parameter]
    outcomes: tuple[torch.Tensor, ...]


def plan_batch(micro_batch: int, grad_accum: int | None, effective_batch: int | None, num_processes: int) -> tuple[int, int]:
    """(grad_accum, effective_batch) such that effective_batch = micro_batch * grad_accum * num_processes.

    Raises: ValueError if neither is given, or if the effective batch does not divide evenly.
    """
    if effective_batch is None:
        if grad_accum is None:
            raise ValueError("neither --grad_accum nor --effective_batch is given: pass one")
        return grad_accum, micro_batch * grad_accum * num_processes
    accum, rest = divmod(effective_batch, micro_batch * num_processes)
    if rest or not accum:
        raise ValueError(
            f"--effective_batch {effective_batch} is not a multiple of micro_batch x processes ="
            f" {micro_batch} x {num_processes}: change --micro_batch or --effective_batch"
        )
    if grad_accum not in (None, accum):
        raise ValueError(
            f"--grad_accum {grad_accum} x micro_batch {micro_batch} x {num_processes} processes is not --effective_batch"
            f" {effective_batch}: leave out --grad_accum"
        )
    return accum, effective_batch


def settle(accelerator: Accelerator, model: torch.nn.Module, micro_batch: Any, loss_sum: LossSum) -> None:
    """One backward pass whose gradient is thrown away, before the first step of a run or of its continuation.

    DistributedDataParallel rearranges its gradient buckets after its first backward pass, and where a gradient lies in a
    bucket decides in which order three or more processes add it. Without this pass the first step after a resume would add
    in another order than the same step of an uninterrupted run, and the weights would differ in their last bits.
    """
    if accelerator.num_processes > 1:
        accelerator.backward(loss_sum(model, micro_batch)[0])
        model.zero_grad()


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Any],
    loss_sum: LossSum,
    weight: float,
    lr: float,
    max_grad_norm: float,
    beta1: float | None = None,
    held: torch.Tensor | None = None,
) -> StepResult | Unread:
    """Update `model` once with the gradient of (sum of all losses) / (sum of all weights), over every process.

    Args:
        micro_batches: this process's part of the step; as many on every process.
        loss_sum: (model, micro_batch) -> its summed loss in nats, whether all its logits are finite (a bool scalar), and, if it
            likes, one more tensor that the caller wants to have (`StepResult.outcomes`).
        weight: what this process's losses weigh together: its number of targets, for a plain language model.
        max_grad_norm: the gradient is scaled down to this L2 norm if it is longer; infinity turns that off.
        beta1: the optimizer's first beta, or its momentum, for this step; None leaves it as it is.
        held: a bool scalar on the device, for optimizers that `can_hold`. Then the device is not waited for, and what is
            returned is to be read later (`read`). The first step that is not finite makes it true, and while it is, no step
            changes anything.

    With fp16, a gradient that overflows under the loss scale lowers the scale, and the step is made again with the same
    micro-batches, so that no example is lost to it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    if beta1 is not None:
        set_beta1(optimizer, beta1)
    if held is not None:
        unread = _gradient(accelerator, model, optimizer, micro_batches, loss_sum, weight)
        torch.logical_or(held, unread.numbers[0] > 0, out=held)
        _bare(optimizer).found_inf = held.float()  # what a gradient scaler tells the fused kernel: then it changes nothing
        _update(model, optimizer, unread, max_grad_norm)
        _bare(optimizer).found_inf = None
        return unread
    scaler = accelerator.scaler  # None but for fp16
    first_scale = scaler and scaler.get_scale()
    while True:
        unread = _gradient(accelerator, model, optimizer, micro_batches, loss_sum, weight)
        (result,) = read([unread], accelerator.unwrap_model(model), max_grad_norm)
        if result.applied:
            _update(model, optimizer, unread, max_grad_norm)
            return result
        if scaler is not None:
            scaler.update()  # lowers the scale after an overflow
        optimizer.zero_grad()
        overflow = math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        if scaler is None or not overflow or scaler.get_scale() < 1.0:  # not the scale's fault: it stays as it was
            if scaler is not None:
                scaler.update(first_scale)
            return result


def can_hold(accelerator: Accelerator, optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> bool:
    """Whether the device itself can leave an update out, so that nobody has to look before it is made.

    torch's fused AdamW can; a loss scale wants to be looked at, and of a divided model each part has a kernel of its own.
    """
    fused = type(_bare(optimizer)) is torch.optim.AdamW and all(group["fused"] for group in optimizer.param_groups)
    return fused and accelerator.scaler is None and not is_sharded(model)


def read(unread: Sequence[Unread], model: torch.nn.Module, max_grad_norm: float) -> list[StepResult]:
    """What became of these steps of the model (not wrapped), in one transfer from the device."""
    with part("wait"):
        rows = torch.stack([step.numbers for step in unread]).tolist()
    results = []
    for step, (bad, loss, norm, param_norm) in zip(unread, rows, strict=True):
        clipped = norm * min(1.0, max_grad_norm / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ scales
        faults = _faults(step, model) if bad else ()
        results.append(StepResult(not bad, loss, norm, clipped, param_norm, faults, step.outcomes))
    return results


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _gradient(accelerator, model, optimizer, micro_batches, loss_sum, weight) -> Unread:
    device = accelerator.device
    own_weight = torch.full((), weight, dtype=torch.float64, device=device)  # torch.tensor would wait for the device
    total_weight = accelerator.reduce(own_weight, "sum")
    scale = (accelerator.num_processes / total_weight).float()  # DDP averages over processes; the objective is a sum
    optimizer.zero_grad()
    losses, finite_logits, outcomes = [], [], []
    for number, micro_batch in enumerate(micro_batches, 1):
        last = number == len(micro_batches)
        with nullcontext() if last else accelerator.no_sync(model):  # the forward pass too: in it DDP decides whether to reduce
            with part("forward"):
                loss, finite, *outcome = loss_sum(model, micro_batch)
            with part("backward"):
                accelerator.backward(loss * scale)
        losses.append(loss.detach().double())
        finite_logits.append(finite)
        outcomes += outcome
    losses, finite_logits = torch.stack(losses), torch.stack(finite_logits)

    with part("clip"):
        accelerator.unscale_gradients()
        parameters = [p for p in model.parameters() if p.grad is not None]
        grad_norms = torch._foreach_norm([p.grad for p in parameters])
        grad_norm = whole(torch.linalg.vector_norm(torch.stack(grad_norms))).to(device)
        param_norm = whole(torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()])).to(device)
    bad = (~(losses.isfinite() & finite_logits)).sum() + ~grad_norm.isfinite()  # reduced: all processes decide together
    with part("wait"):
        sums = accelerator.reduce(torch.stack([losses.sum(), bad.double()]), "sum")
    numbers = torch.stack([sums[1], sums[0] / total_weight, grad_norm.double(), param_norm.double()])
    grad_norms = [local(norm) for norm in grad_norms]
    return Unread(numbers, losses, finite_logits, grad_norm, grad_norms, parameters, tuple(outcomes))


def _update(model, optimizer, unread: Unread, max_grad_norm: float) -> None:
    with part("clip"):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, unread.grad_norm)
    with part("optimizer"):
        optimizer.step()
    optimizer.zero_grad()


def _faults(step: Unread, model: torch.nn.Module) -> tuple[str, ...]:
    names = [f"loss of micro-batch {i}" for i in (~step.losses.isfinite()).nonzero().flatten().tolist()]
    names += [f"logits of micro-batch {i}" for i in (~step.finite_logits).nonzero().flatten().tolist()]
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    norms = zip(step.parameters, step.grad_norms, strict=True)
    return (*names, *(f"gradient of {name_of[parameter]}" for parameter, norm in norms if not norm.isfinite()))
