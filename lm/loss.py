"""Cross-entropy of a causal language model's head, without its logits ever being whole.

A micro-batch of 8 x 512 tokens has 800 MB of logits at a vocabulary of 50,304, and a plain loss makes several tensors of that
size. Here the head works on some hundred tokens at a time and each chunk leaves its share of the gradient behind at once, so
nothing is computed twice; the same idea as Liger Kernel's fused linear cross-entropy (Hsu et al., arXiv 2410.10989). Losses are
sums, so that one divisor serves all micro-batches and processes of a step.

Shapes: N tokens (B x T of them in rows), M of them trained, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lm.packing import Batch

MEASURED = ("c4_nats", "c4_targets", "synthetic_nats", "synthetic_targets", "synthetic_right", "synthetic_rows")
CHUNK = 2**25  # logits at a time: 128 MiB in float32
IN_CACHE = 2**19  # logits at a time that a CPU's caches hold while the softmax passes over them

_ends_with_head: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


class TokenLosses(NamedTuple):
    """What a forward pass says of its targets; `total` alone has a gradient, and nothing waits for the device."""

    total: torch.Tensor  # summed weighted loss in nats, float32 scalar
    nats: torch.Tensor  # loss of each target, float32 (B, T)
    finite: torch.Tensor  # bool scalar: whether every logit is; a -inf at another token than the target leaves the loss finite
    right: torch.Tensor | None  # bool (B, T): whether the target is the most likely token; None if that was not asked


def token_losses(
    model: torch.nn.Module,
    targets_BT: torch.Tensor,
    weights_BT: torch.Tensor | None = None,
    most_likely: bool = False,
    trained_M: torch.Tensor | None = None,
    **inputs: torch.Tensor,
) -> TokenLosses:
    """The losses of these targets, given `inputs` (input_ids and what else the model takes).

    Computed inside the model's own forward pass, in place of its head, so that whatever wraps the model sees to the head's
    parameters as ever. A model that does more to its logits than a linear head is computed plainly.

    Args:
        model: a causal language model of transformers, wrapped or not.
        weights_BT: float32; None weighs every target 1.
        most_likely: whether `right` is wanted, which takes a further pass over the logits.
        trained_M: int64, places in `targets_BT.flatten()`, each once: no others have logits, nats or are right; None: all have.
    """
    bare = getattr(model, "module", model)

    def chosen(rows_NX: torch.Tensor) -> torch.Tensor:
        return rows_NX if trained_M is None else rows_NX.index_select(0, trained_M)

    def at_places(values_M: torch.Tensor) -> torch.Tensor:
        if trained_M is not None:
            values_M = values_M.new_zeros(targets_BT.numel()).index_copy_(0, trained_M, values_M)
        return values_M.view(targets_BT.shape)

    targets_M, weights_M = chosen(targets_BT.flatten()), None if weights_BT is None else chosen(weights_BT.flatten())
    if _is_linear_to_the_end(bare):
        head, found = bare.get_output_embeddings(), []

        def measure(hidden_BTD: torch.Tensor) -> torch.Tensor:
            options = targets_M, weights_M, most_likely, torch.is_grad_enabled()
            found.extend(_HeadLoss.apply(chosen(hidden_BTD.flatten(0, -2)), head.weight, head.bias, *options))
            return found[0]

        with _in_place_of(head, measure):
            model(**inputs, use_cache=False)
        total, nats_M, finite, right_M = found
    else:
        logits_MV = chosen(model(**inputs, use_cache=False).logits.flatten(0, 1))
        with_gradient = F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
        total = (with_gradient if weights_M is None else with_gradient * weights_M).sum()
        nats_M, (low, high) = with_gradient.detach(), torch.aminmax(logits_MV.detach())
        finite = low.isfinite() & high.isfinite()
        right_M = logits_MV.argmax(dim=1) == targets_M if most_likely else None
    return TokenLosses(total, at_places(nats_M), finite, at_places(right_M) if most_likely else None)


class _HeadLoss(torch.autograd.Function):
    """Summed loss of a linear head; the gradients are made in the forward pass, chunk by chunk.

    With float16 they wait for the backward pass, which then makes the logits again: only there is the loss scale known that
    keeps them from vanishing or overflowing.
    """

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, targets_N, weights_N, most_likely, with_gradient):
        device = hidden_ND.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else weight_VD.dtype
        given = hidden_ND, weight_VD, bias_V, targets_N, weights_N
        ctx.later = with_gradient and dtype == torch.float16
        with torch.autocast(device, enabled=False):
            gradients, nats_N, finite, right_N = _chunks(*given, dtype, most_likely, with_gradient and not ctx.later, None)
        ctx.given = (*given, dtype) if ctx.later else None
        ctx.gradients = gradients
        ctx.mark_non_differentiable(nats_N, finite, *([right_N] if most_likely else []))
        ctx.set_materialize_grads(False)
        total = (nats_N if weights_N is None else nats_N * weights_N).sum()  # no matrix product: it could be rounded
        return total, nats_N, finite, right_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, *_):
        if ctx.later:
            gradients = _chunks(*ctx.given, False, True, grad_total)[0]
        else:
            gradients = [None if own is None else own.mul_(grad_total) for own in ctx.gradients]
        ctx.given = ctx.gradients = None
        return *gradients, None, None, None, None


def _chunks(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor | None,
    dtype: torch.dtype,
    most_likely: bool,
    with_gradient: bool,
    scale: torch.Tensor | None,
) -> tuple[list[torch.Tensor | None], torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of hidden states, weight and bias (each None without one); nats, whether all logits are finite, and `right`.

    Matrices multiply in `dtype`, the softmax is float32 throughout, and the weight's gradient is summed in float32.
    """
    hidden_ND, weight, (N, V) = hidden_ND.detach(), weight_VD.detach(), (len(hidden_ND), len(weight_VD))
    hidden, head = hidden_ND.to(dtype), weight.to(dtype)
    bias, beta = (head.new_empty(1), 0) if bias_V is None else (bias_V.detach().to(dtype), 1)  # with 0 it is not read
    nats = torch.empty(N, device=hidden.device)
    right = torch.empty(N, dtype=torch.bool, device=hidden.device) if most_likely else None
    size, extremes = max(1, min(N, CHUNK // V)), []
    rows = size if hidden.is_cuda else max(1, IN_CACHE // V)
    most = 2 if isinstance(hidden, FakeTensor) else None  # lm.activations: all need as much memory as two of them
    grad_hidden = torch.empty_like(hidden) if with_gradient else None
    grad_weight = torch.zeros(weight.shape, device=hidden.device) if with_gradient else None
    grad_bias = torch.zeros(V, device=hidden.device) if with_gradient and beta else None
    logits = torch.empty(size, V, dtype=dtype, device=hidden.device)  # and then their gradient
    for first in range(0, N, size)[:most]:
        part = slice(first, min(first + size, N))
        chunk = torch.addmm(bias, hidden[part], head.t(), beta=beta, out=logits[: part.stop - first])
        for low in range(0, len(chunk), rows)[:most]:
            few, own = chunk[low : low + rows], slice(first + low, min(first + low + rows, part.stop))
            targets = targets_N[own, None]
            extremes += torch.aminmax(few)
            if most_likely:
                right[own] = few.argmax(dim=1) == targets[:, 0]
            log_shares = torch.log_softmax(few, dim=1, dtype=torch.float32)
            of_targets = log_shares.gather(1, targets)
            nats[own] = -of_targets[:, 0]
            if with_gradient:  # (share - 1 at the target) x weight
                gradient, at_targets = log_shares.exp_(), of_targets.expm1()
                if weights_N is not None or scale is not None:
                    factor = torch.ones_like(at_targets) if weights_N is None else weights_N[own, None]
                    factor = factor if scale is None else factor * scale
                    gradient, at_targets = gradient.mul_(factor), at_targets * factor
                few.copy_(gradient.scatter_(1, targets, at_targets))
        if with_gradient:
            torch.mm(chunk, head, out=grad_hidden[part])
            if dtype == torch.float32:
                grad_weight.addmm_(chunk.t(), hidden[part])
            else:
                grad_weight += chunk.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += chunk.sum(dim=0, dtype=torch.float32)
    if with_gradient:
        grad_hidden, grad_weight = grad_hidden.to(hidden_ND.dtype), grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias_V.dtype)
    return [grad_hidden, grad_weight, grad_bias], nats, torch.stack(extremes).isfinite().all(), right


def _is_linear_to_the_end(bare: torch.nn.Module) -> bool:
    """Whether the model's logits are what its head, a linear layer, gives, and nothing is done to them afterwards."""
    if bare not in _ends_with_head:
        _ends_with_head[bare] = _try_the_end(bare)
    return _ends_with_head[bare]


@torch.no_grad()
def _try_the_end(bare: torch.nn.Module) -> bool:
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    if not isinstance(head, torch.nn.Linear) or type(head).forward is not torch.nn.Linear.forward:
        return False
    given, training = [], bare.training

    def note(hidden: torch.Tensor) -> torch.Tensor:
        given.append(F.linear(hidden, head.weight, head.bias).float())  # accelerate would make a float32 copy of another
        return given[0]

    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(bare.parameters()).device)
    bare.eval()
    with _in_place_of(head, note):
        logits = bare(input_ids=ids, use_cache=False).logits
    bare.train(training)
    return len(given) == 1 and logits is given[0] and logits.shape[:2] == ids.shape


@contextmanager
def _in_place_of(head: torch.nn.Module, forward: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Inside, the module computes this; hooks on it stay."""
    head.forward = forward
    try:
        yield
    finally:
        del head.forward


def next_token_loss(model: torch.nn.Module, ids_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed loss of every token but the first of each row (any integers), and whether all logits are finite."""
    ids_BS = ids_BS.long()
    found = token_losses(model, ids_BS[:, 1:], input_ids=ids_BS[:, :-1])
    return found.total, found.finite


def packed_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed weighted loss of a packed micro-batch (`lm.packing.pack`), whether every logit is finite, and `correct`.

    `correct` (n,) says of each example whether the most likely token is right at each target of its answer, EOS included.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    found = token_losses(model, batch["targets"], batch["weights"], True, batch["trained"], **inputs)
    wrong = ~found.right & batch["answer"]
    errors = torch.zeros(len(batch["lengths"]) + 1, dtype=torch.int64, device=wrong.device)
    errors.index_add_(0, batch["example"].flatten(), wrong.flatten().long())
    return found.total, found.finite, errors[:-1] == 0


def mixed_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The summed weighted loss of a micro-batch of rows (`lm.mixed_rows`), whether every logit is finite, and `MEASURED`.

    The last is float64 (6,): nats and number of the targets of text; nats and number of the trained targets of synthetic
    rows; how many of these rows have the most likely token right at each target of the answer, EOS included; their number.
    """
    has_synthetic = "answer" in batch
    weights = batch["weights"] if has_synthetic else None
    found = token_losses(model, batch["targets"], weights, has_synthetic, batch.get("trained"), input_ids=batch["input_ids"])
    if not has_synthetic:
        nats, none = found.nats.double().sum(), torch.zeros(4, dtype=torch.float64, device=found.nats.device)
        return found.total, found.finite, torch.cat([torch.stack([nats, torch.full_like(nats, found.nats.numel())]), none])
    synthetic, nats = batch["synthetic"], found.nats.double().sum(dim=1)
    wrong = (~found.right & batch["answer"]).any(dim=1)
    targets = (batch["weights"] > 0).sum(dim=1)
    measured = [nats * ~synthetic, targets * ~synthetic, nats * synthetic, targets * synthetic, ~wrong & synthetic, synthetic]
    return found.total, found.finite, torch.stack([values.double().sum() for values in measured])


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
