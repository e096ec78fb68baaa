"""Held-out loss of a causal language model at every position of given windows, and standard errors that know papers.

Shapes: N windows, T targets in each, V vocabulary, G groups (papers).
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from accelerate import Accelerator

from lm.fsdp import device_of
from lm.loss import token_losses
from lm.precision import autocast


@torch.no_grad()
def window_losses(model: torch.nn.Module, windows: np.ndarray, micro_batch: int, precision: str = "fp32") -> np.ndarray:
    """The loss of target t of every window given the t + 1 tokens before it, in nats, as float64 (N, T).

    Runs on the model's device with dropout off, and leaves the model in the mode it was in.

    Args:
        model: a Hugging Face causal language model, not wrapped for data parallelism.
        windows: (N, T + 1) integers; tokens 0 .. T - 1 are the inputs, 1 .. T the targets.
        micro_batch: windows in one forward pass.
        precision: "fp32", or "bf16" or "fp16" for autocast. The logarithm is always taken in float32.
    """
    device = device_of(model)
    losses = torch.empty(len(windows), windows.shape[1] - 1, device=device)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(windows), micro_batch):
            ids = torch.from_numpy(windows[start : start + micro_batch].astype(np.int64)).to(device)
            with autocast(device, precision):
                losses[start : start + micro_batch] = token_losses(model, ids[:, 1:], input_ids=ids[:, :-1]).nats
    finally:
        model.train(was_training)
    return losses.double().cpu().numpy()


def mean_loss(model: torch.nn.Module, windows: np.ndarray, micro_batch: int, accelerator: Accelerator, precision: str) -> float:
    """The mean loss of all targets of the windows, in nats; the processes share them.

    Raises: RuntimeError, on every process, if it is not finite.
    """
    own = windows[accelerator.process_index :: accelerator.num_processes]
    as_many = -(-len(windows) // accelerator.num_processes)  # for every process: a divided model needs all of them in a pass
    losses = window_losses(model, np.concatenate([own, windows[: as_many - len(own)]]), micro_batch, precision)[: len(own)]
    sums = torch.tensor([losses.sum(), losses.size], dtype=torch.float64, device=accelerator.device)
    total, count = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(total):
        raise RuntimeError(f"the held-out loss is {total}, a finite one is needed: lower --lr, or use --precision fp32")
    return total / count


def consecutive_windows(tokens: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows (N, T + 1) in which every token but the first is a target exactly once, and how many targets each holds.

    The tail of the last window is filled with id 0: a causal model's losses before it do not depend on it.
    """
    num_targets = max(len(tokens) - 1, 0)
    num_windows = math.ceil(num_targets / sequence_length)
    padded = np.zeros(num_windows * sequence_length + 1, tokens.dtype)
    padded[: len(tokens)] = tokens[: len(padded)]
    if not num_windows:
        return np.empty((0, sequence_length + 1), tokens.dtype), np.empty(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(padded, sequence_length + 1)[::sequence_length]
    return windows, np.minimum(sequence_length, num_targets - sequence_length * np.arange(num_windows))


def document_losses(
    model: torch.nn.Module,
    documents: Iterable[np.ndarray],
    sequence_length: int,
    micro_batch: int,
    precision: str = "fp32",
) -> Iterator[tuple[float, int]]:
    """Yield, for each document, the summed loss (nats) of all its tokens but the first, and their number.

    Documents are read in consecutive windows; the context starts anew in each. Windows of several documents share a
    forward pass.
    """
    held: list[tuple[np.ndarray, np.ndarray]] = []
    for document in documents:
        held.append(consecutive_windows(document, sequence_length))
        if sum(len(windows) for windows, _ in held) >= 8 * micro_batch:
            yield from _sums(model, held, micro_batch, precision)
            held = []
    if held:
        yield from _sums(model, held, micro_batch, precision)


def _sums(model, held, micro_batch: int, precision: str) -> Iterator[tuple[float, int]]:
    windows, targets = (np.concatenate(parts) for parts in zip(*held, strict=True))
    losses = window_losses(model, windows, micro_batch, precision)
    losses[np.arange(losses.shape[1]) >= targets[:, None]] = 0.0
    ends = np.cumsum([len(own) for own, _ in held])
    for (_, own), part in zip(held, np.split(losses, ends[:-1]), strict=True):
        yield float(part.sum()), int(own.sum())


def mean_and_se(losses: np.ndarray, papers: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The mean over axis 0, and its standard error over windows, those of one paper counted as one observation.

    Windows of one paper resemble each other, so that the usual s / sqrt(N) would be too small. Papers are drawn
    independently; the error is therefore taken between them (`ratio_and_se`).

    Args:
        losses: (N, ...), one row a window.
        papers: (N,), any label of the paper that each window is from; None: each from a paper of its own, which gives
            the usual s / sqrt(N).
    """
    if papers is None:
        return ratio_and_se(losses, np.ones(len(losses)))
    names, paper_of = np.unique(papers, return_inverse=True)
    sums = np.zeros((len(names), *losses.shape[1:]))
    np.add.at(sums, paper_of, losses)
    return ratio_and_se(sums, np.bincount(paper_of))


def ratio_and_se(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sum(sums) / sum(counts) over G independent groups, and its standard error; NaN for a single group.

    The linearised variance of a ratio of totals, G / (G - 1) sum_g (s_g - mean n_g)^2 / (sum_g n_g)^2: Cochran,
    Sampling Techniques (3rd ed. 1977), chapter 6, without the finite-population factor, since the question is about
    all papers of the category and not about these.

    Args:
        sums: (G, ...); counts: (G,).
    """
    groups, total = len(counts), counts.sum()
    mean = sums.sum(axis=0) / total
    residuals = sums - mean * counts.reshape(-1, *[1] * (sums.ndim - 1))
    if groups < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, np.sqrt(groups / (groups - 1) * (residuals**2).sum(axis=0)) / total


def context_bins(num_positions: int, per_octave: int = 4) -> list[tuple[int, int]]:
    """Half-open ranges that cover positions 0 .. num_positions - 1, evenly wide in the logarithm of the context length."""
    edges = 2 ** (np.arange(math.ceil(math.log2(num_positions + 1)) * per_octave + 1) / per_octave)
    starts = sorted({round(edge) - 1 for edge in edges if round(edge) <= num_positions})
    if len(starts) > 1 and num_positions - starts[-1] < starts[-1] - starts[-2]:
        starts.pop()  # a short last range would be the noisiest
    return list(zip(starts, [*starts[1:], num_positions], strict=True))


def binned(values: np.ndarray, bins: list[tuple[int, int]]) -> np.ndarray:
    """The mean over each range of positions (last axis)."""
    return np.stack([values[..., start:stop].mean(axis=-1) for start, stop in bins], axis=-1)


def bin_centres(bins: list[tuple[int, int]]) -> np.ndarray:
    """The context length, in tokens, at the middle of each range on a log axis; position t has t + 1 tokens of context."""
    return np.array([math.sqrt((start + 1) * stop) for start, stop in bins])
