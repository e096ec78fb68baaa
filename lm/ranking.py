"""Whether one list of models ranks recipes like another: decision accuracy with its interval, seed noise, spread.

Decision accuracy (Magnusson et al., DataDecide, arXiv 2504.11393, section 2.3) is the share of all pairs of recipes that a
small size puts in the order of the target size. Each seed of the small size predicts by itself, and the accuracies are
averaged; the target is a mean over seeds. A pair counts as right if the signs of both differences are equal: two ties agree,
a tie and a difference do not. What a recipe lacks (a seed, a task) leaves out the pairs that need it.

The interval is of the decision accuracy that is to be expected of recipes drawn from where these come from, with as many seeds
as here. The recipes are what is independent, not their pairs; so recipes are resampled, each with all of its runs, and a pair
of a recipe with itself is left out (Snijders & Borgatti, Connections 22(2), 1999). The noise of seeds is within: every recipe
has its own. With few recipes the percentiles of this bootstrap are far too narrow, and of no width if all pairs are right.
So its variance V is used, for the effective number of pairs a (1 - a) / V in Wilson's score interval, as for a proportion of a
clustered sample (Korn & Graubard, Survey Methodology 24(2), 1998); if V is 0 the number is that of disjoint pairs, recipes / 2.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

DRAWS = 2000
Z = 1.959963984540054  # the normal distribution has 2.5 % above it


class Decision(NamedTuple):
    """A decision accuracy with its 95 % interval; NaN if no pair can be compared."""

    accuracy: float
    low: float
    high: float
    num_pairs: int


def agreement(prediction: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(pairs,) the share of seeds that put a pair in the target's order, NaN where none can; pairs as in np.triu_indices(R, 1).

    Args: prediction: (R, S) higher is better, NaN where recipe or seed was not measured; target: (R,) likewise.
    """
    first, second = np.triu_indices(len(target), 1)
    predicted = np.sign(prediction[first] - prediction[second])
    wanted = np.sign(target[first] - target[second])[:, None]
    known = np.isfinite(predicted) & np.isfinite(wanted)
    right = known & (predicted == wanted)
    return np.divide(right.sum(1), known.sum(1), out=np.full(len(first), np.nan), where=known.any(1))


def decide(prediction: np.ndarray, target: np.ndarray, draws: int = DRAWS) -> Decision:
    """The decision accuracy of a small size, with arguments as in `agreement`."""
    right = agreement(prediction, target)
    known = np.isfinite(right)
    if not known.any():
        return Decision(math.nan, math.nan, math.nan, 0)
    accuracy, num_pairs = float(right[known].mean()), int(known.sum())
    # Recipes that are in no pair are none of those that are resampled.
    first, second = np.triu_indices(len(target), 1)
    present = np.unique(np.concatenate([first[known], second[known]]))
    place = np.full(len(target), -1)
    place[present] = np.arange(len(present))
    weights = _pair_weights(len(present), draws)[:, place[first[known]], place[second[known]]]
    total = weights.sum(1)
    resampled = (weights @ right[known])[total > 0] / total[total > 0]
    variance = float(resampled.var())
    effective = accuracy * (1 - accuracy) / variance if variance > 1e-12 else len(present) / 2
    return Decision(accuracy, *wilson(accuracy, min(max(effective, 1.0), num_pairs)), num_pairs)


@lru_cache(maxsize=8)
def _pair_weights(num_recipes: int, draws: int) -> np.ndarray:
    """(draws, R, R) how often each pair is in a resampled set of recipes; the same for every measure, so that they compare."""
    times = np.random.default_rng(0).multinomial(num_recipes, np.full(num_recipes, 1 / num_recipes), size=draws)
    return times[:, :, None].astype(np.float32) * times[:, None, :]


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of `count`, which need not be whole."""
    center = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * math.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, center - half), min(1.0, center + half)


def seed_noise(values: np.ndarray) -> float:
    """The standard deviation over seeds (n - 1), averaged over the recipes (rows) that have two or more; NaN if none has."""
    rows = [row[np.isfinite(row)] for row in values]
    deviations = [row.std(ddof=1) for row in rows if len(row) > 1]
    return float(np.mean(deviations)) if deviations else math.nan


def spread(values: np.ndarray) -> float:
    """The standard deviation over recipes (n - 1) of their means over seeds; NaN if fewer than two were measured."""
    means = seed_means(values)
    means = means[np.isfinite(means)]
    return float(means.std(ddof=1)) if len(means) > 1 else math.nan


def seed_means(values: np.ndarray) -> np.ndarray:
    """(R,) the mean of each row over what is there, NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(values), np.nan), where=known.any(1))
