"""The losses of a language model on papers: of random windows by position, and of every token of whole papers."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from lm.measure import document_losses, window_losses
from lm.papers import Papers


def papers_to_score(papers: Papers, split: str, category: str, max_papers: int | None, seed: int) -> np.ndarray:
    """The papers of one category in the split with at least one target, at most `max_papers` of them, drawn with `seed`."""
    chosen = papers.splits[split]
    mine = chosen[(papers.categories[chosen] == papers.category_names.index(category)) & (papers.lengths[chosen] > 1)]
    if max_papers is None or len(mine) <= max_papers:
        return mine
    return np.sort(np.random.default_rng(seed).choice(mine, max_papers, replace=False))


def all_window_losses(
    model: torch.nn.Module,
    windows: Iterable[np.ndarray],
    micro_batch: int,
    precision: str,
    name: str,
    done: Callable[[int], object],
) -> np.ndarray:
    """(N, T) nats of the targets of all windows, which come as arrays (n, T + 1).

    Args: name: of the windows, for messages; done: is told how many targets were measured since the last time.
    Raises: RuntimeError if a loss is not finite.
    """
    parts = []
    for some in windows:
        parts.append(window_losses(model, some, micro_batch, precision))
        done(parts[-1].size)
    losses = np.concatenate(parts)
    if not np.isfinite(losses).all():
        window, position = np.argwhere(~np.isfinite(losses))[0]
        raise RuntimeError(
            f"{name}: the loss of window {window} at position {position} is {losses[window, position]}, finite ones are needed:"
            " the weights are damaged, or try --precision fp32"
        )
    return losses


def paper_totals(
    model: torch.nn.Module,
    papers: Papers,
    chosen: Sequence[int],
    sequence_length: int,
    micro_batch: int,
    precision: str,
    done: Callable[[int], object],
) -> np.ndarray:
    """(papers, 2): the summed loss of each paper, in nats, and its number of targets; `done` is told of these."""
    texts = [papers.tokens[papers.offsets[paper] :][: papers.lengths[paper]] for paper in chosen]
    for paper, text in zip(chosen, texts, strict=True):
        if text.max() >= papers.meta["vocab_size"]:
            raise ValueError(
                f"paper {papers.paper_ids[paper]} has id {text.max()}, outside the vocabulary of {papers.meta['vocab_size']}:"
                f" {papers.folder} is damaged, make it again with fetch_arxiv.py"
            )
    totals = []
    for total in document_losses(model, texts, sequence_length, micro_batch, precision):
        totals.append(total)
        done(total[1])
    return np.array(totals)
