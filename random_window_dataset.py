"""Random windows of papers: example n of a run is a function of (seed, n), and never crosses from one paper into another.

Reads a folder that `fetch_arxiv.py` wrote. One epoch is one window for each eligible paper, as in the experiments this
follows (github.com/Astera-org/ICL-non-ergodic-arxiv), so with the default `category_weighting="paper"` a category counts by
its papers, not by its tokens.

    dataset = RandomWindowDataset("preprocessed_arxiv", "train", sequence_length=100, target_categories=["cs.CV"], seed=0)
    dataset.windows(0, 512)          # examples 0 .. 511 at once, as (512, 101)
    dataset.set_epoch(1); dataset[3]  # item 3 of epoch 1 is example len(dataset) + 3
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lm import draws
from lm.papers import Papers, read_papers

OTHER_PAPERS = 10  # tried when a window holds an id outside the vocabulary, before giving up
DRAWN_AHEAD = 512  # examples at most, while they are asked for in order: these take three times as long to draw as 16

Sampling = Literal["random", "permutation"]
Weighting = Literal["paper", "token", "equal"]


def choose_categories(names: Sequence[str], K: int, seed: int) -> list[str]:
    """K of the categories, sorted by name; for one seed, those for K are among those for K + 1.

    Raises: ValueError if there are fewer than K.
    """
    if not 1 <= K <= len(names):
        raise ValueError(f"--K {K}, but the data has {len(names)} categories ({', '.join(sorted(names))}): choose K from 1")
    shuffled = sorted(names)
    random.Random(seed).shuffle(shuffled)
    return sorted(shuffled[:K])


class RandomWindowDataset(torch.utils.data.Dataset):
    """Windows of `sequence_length + 1` tokens of one paper each; `len()` is the number of eligible papers.

    Args:
        data: folder written by fetch_arxiv.py, or what `read_papers` returned for it.
        split: "train", "validation" or "test".
        sequence_length: number of targets in a window.
        target_categories: only papers of these; None takes all.
        seed: with an example's index, decides its paper and where its window starts.
        sampling: "random" draws the paper with replacement; "permutation" takes every paper once an epoch.
        category_weighting: with "random", the chance of a paper. "paper": all papers alike, so a category counts by its
            papers. "token": by the paper's length. "equal": categories alike, then papers alike.
        vocab_size: ids must lie below it; None takes the data's own.

    Raises: ValueError, all faults together, if an argument is unknown or no paper is eligible.
    """

    def __init__(
        self,
        data: str | Path | Papers,
        split: str,
        sequence_length: int = 100,
        target_categories: Sequence[str] | None = None,
        seed: int = 0,
        sampling: Sampling = "random",
        category_weighting: Weighting = "paper",
        vocab_size: int | None = None,
    ):
        papers = data if isinstance(data, Papers) else read_papers(data)
        names = sorted(papers.category_names if target_categories is None else set(target_categories))
        faults = [
            f"category {name!r} is not in {papers.folder}: choose from {', '.join(papers.category_names)}"
            for name in names
            if name not in papers.category_names
        ]
        if split not in papers.splits:
            faults.append(f"split {split!r} is not in {papers.folder}: choose from {', '.join(papers.splits)}")
        if sequence_length < 1:
            faults.append(f"sequence_length {sequence_length} is below 1: a window needs a target")
        if sampling not in ("random", "permutation"):
            faults.append(f"sampling {sampling!r} is unknown: choose random or permutation")
        if category_weighting not in ("paper", "token", "equal"):
            faults.append(f"category_weighting {category_weighting!r} is unknown: choose paper, token or equal")
        if sampling == "permutation" and category_weighting != "paper":
            faults.append(
                f"category_weighting {category_weighting} needs --sampling random: a permutation takes each paper once"
            )
        if faults:
            raise ValueError("\n".join(faults))

        in_split = papers.splits[split]
        wanted = np.isin(papers.categories[in_split], [papers.category_names.index(name) for name in names])
        long_enough = papers.lengths[in_split] >= sequence_length + 1
        self.papers = papers
        self.categories = names
        self.sequence_length = sequence_length
        self.seed = seed
        self.sampling = sampling
        self.vocab_size = papers.meta["vocab_size"] if vocab_size is None else vocab_size
        self.eligible = in_split[wanted & long_enough]  # indices into `papers`
        self.num_too_short = int(np.sum(wanted & ~long_enough))
        there = {papers.category_names[code] for code in np.unique(papers.categories[self.eligible])}
        if missing := [name for name in names if name not in there]:
            raise ValueError(
                f"no paper of {', '.join(missing)} in split {split!r} has {sequence_length + 1} tokens"
                f" ({self.num_too_short} papers are shorter): lower --sequence_length, or choose other categories"
            )
        self.epoch = 0
        weights = self._paper_weights(category_weighting)
        self._cumulative = np.cumsum(weights) / np.sum(weights)
        self._cumulative[-1] = 1.0
        self._all_windows = np.lib.stride_tricks.sliding_window_view(papers.tokens, sequence_length + 1)
        self._order: tuple[int, np.ndarray] | None = None
        self._located, self._papers, self._first_tokens = range(0), np.empty(0, np.int64), np.empty(0, np.int64)

    def _paper_weights(self, category_weighting: Weighting) -> np.ndarray:
        if category_weighting == "token":
            return self.papers.lengths[self.eligible].astype(np.float64)
        if category_weighting == "equal":
            categories = self.papers.categories[self.eligible]
            return 1.0 / np.bincount(categories)[categories]
        return np.ones(len(self.eligible))

    @property
    def category_shares(self) -> dict[str, float]:
        """The probability that an example comes from each category."""
        weights = np.diff(self._cumulative, prepend=0.0)
        sums = np.bincount(self.papers.categories[self.eligible], weights, len(self.papers.category_names))
        return {name: float(sums[self.papers.category_names.index(name)]) for name in self.categories}

    def __len__(self) -> int:
        return len(self.eligible)

    def set_epoch(self, epoch: int) -> None:
        """Make `dataset[i]` item i of this epoch."""
        self.epoch = epoch

    def __getitem__(self, item: int) -> torch.Tensor:
        """Item `item` of the current epoch, (sequence_length + 1,), with the dtype of the data."""
        if not 0 <= item < len(self):
            raise IndexError(f"item {item} of {len(self)}")
        return torch.from_numpy(self.windows(self.epoch * len(self) + item, 1)[0])

    def __getitems__(self, examples: range) -> torch.Tensor:
        """Consecutive examples of the endless sequence of epochs, as (len(examples), sequence_length + 1)."""
        return torch.from_numpy(self.windows(examples.start, len(examples)))

    def locate(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Where examples start .. start + count - 1 are drawn: indices into `papers`, and first tokens within those papers."""
        if start not in self._located or start + count > self._located.stop:
            ahead = max(DRAWN_AHEAD // max(count, 1), 1) if start == self._located.stop else 1  # more of the same, in order
            self._located = range(start, start + ahead * count)
            self._papers, self._first_tokens = self._locate(self._located)
        rows = slice(start - self._located.start, start - self._located.start + count)
        return self._papers[rows].copy(), self._first_tokens[rows].copy()

    def _locate(self, examples: range) -> tuple[np.ndarray, np.ndarray]:
        draw = draws.uniforms(self.seed, "window", examples.start, len(examples))
        if self.sampling == "random":
            position = np.searchsorted(self._cumulative, draw[:, 0], side="right")
        else:
            position = self._permuted(examples)
        paper = self.eligible[position]
        return paper, self._first_token(paper, draw[:, 1])

    def _first_token(self, paper: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return (uniform * (self.papers.lengths[paper] - self.sequence_length)).astype(np.int64)

    def _permuted(self, examples: range) -> np.ndarray:
        epochs, items = np.divmod(np.array(examples, dtype=np.int64), len(self))
        for epoch in np.unique(epochs).tolist():
            items[epochs == epoch] = self._order_of(epoch)[items[epochs == epoch]]
        return items

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, draws.permutation(self.seed, f"epoch/{epoch}", len(self))
        return self._order[1]

    def sources(self, examples: range) -> list[tuple[str, int]]:
        """The paper id and first token of each example."""
        _, papers, first = self.draw(examples.start, len(examples))
        return [(self.papers.paper_ids[paper], int(token)) for paper, token in zip(papers, first, strict=True)]

    def windows(self, start: int, count: int) -> np.ndarray:
        """Examples start .. start + count - 1, as (count, sequence_length + 1) with the dtype of the data. Raises as `draw`."""
        return self.draw(start, count)[0]

    def draw(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same and where each was taken: index into `papers`, and first token within that paper.

        Raises: ValueError if a window holds an id outside the vocabulary, and so do those of ten other papers.
        """
        paper, first = self.locate(start, count)
        windows = self._all_windows[self.papers.offsets[paper] + first]
        for row in np.flatnonzero(windows.max(axis=1) >= self.vocab_size):
            windows[row], paper[row], first[row] = self._from_another_paper(start + int(row), paper[row], first[row])
        return windows, paper, first

    def _from_another_paper(self, example: int, paper: int, first: int) -> tuple[np.ndarray, int, int]:
        found = self._name_bad_id(paper, first)
        print(f"warning: {found}: taking another paper for example {example}", flush=True)
        for attempt in range(OTHER_PAPERS):
            draw = draws.uniforms(self.seed, f"window/{attempt}", example, 1)[0]
            other = self.eligible[int(draw[0] * len(self))]
            start = self._first_token(other, draw[1])
            window = self._all_windows[self.papers.offsets[other] + start]
            if window.max() < self.vocab_size:
                return window, other, start
        raise ValueError(
            f"{found}, and {OTHER_PAPERS} other papers are no better: tokenizer and {self.papers.folder} do not belong"
            " together, or the file is damaged; make it again with fetch_arxiv.py"
        )

    def _name_bad_id(self, paper: int, first: int) -> str:
        window = self._all_windows[self.papers.offsets[paper] + first]
        position = int(np.argmax(window >= self.vocab_size))
        return (
            f"paper {self.papers.paper_ids[paper]} has id {window[position]} at position {first + position},"
            f" outside the vocabulary of {self.vocab_size}"
        )
