"""What a model of K categories loses against models of one category each, and how much of it context could tell.

Take a predictor that is ideal for a mixture of categories with shares p_c, and one that is ideal for category c. On text
of c the first loses, summed over the positions of a window, at most -ln p_c nats more than the second: the mixture gives
any text at least p_c times the probability that c gives it. Averaged over the categories this is at most
H(p) = -sum p_c ln p_c <= ln K, and it is what the window tells about its category (Riechers et al., arXiv 2505.18373).

Trained models are not ideal, and differ in what they learned of the text itself, at every position. So the area is also
taken above the tail, the mean over the second half of the positions, where context has little left to tell. (Half,
because this mean counts once for every position: over a tenth of them its noise is all that the area shows.)
"""

import math

import numpy as np

from lm.measure import binned, mean_and_se


def tail_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the second half of the positions (last axis), at least one."""
    return values[..., values.shape[-1] // 2 :].mean(axis=-1)


def area(values: np.ndarray) -> np.ndarray:
    """The sum over positions (last axis)."""
    return values.sum(axis=-1)


def area_above_tail(values: np.ndarray) -> np.ndarray:
    """The sum over positions (last axis) of what exceeds the mean of the second half."""
    return area(values) - values.shape[-1] * tail_mean(values)


def over_categories(
    values: dict[str, np.ndarray], papers: dict[str, np.ndarray], weights: dict[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean of what was measured on windows, and its standard error; categories are independent.

    Args:
        values: category -> (N, ...), one row a window; papers: category -> (N,) the paper of each.
        weights: category -> its weight; only these are used.
    """
    parts = [(weight, *mean_and_se(values[name], papers[name])) for name, weight in weights.items()]
    mean = sum(weight * mean for weight, mean, _ in parts)
    return mean, np.sqrt(sum((weight * se) ** 2 for weight, _, se in parts))


def over_runs(values: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over runs (axis 0) and its standard error: between runs, or that of the only run over its windows."""
    mean = np.mean(values, axis=0)
    return mean, np.std(values, axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.asarray(errors[0])


def entropy(shares: dict[str, float]) -> float:
    """H(p) in nats."""
    return -sum(p * math.log(p) for p in shares.values() if p > 0)


def bound(shares: dict[str, float], weights: dict[str, float]) -> float:
    """The largest area of an ideal predictor, in nats: the mean of -ln p_c over categories with these weights."""
    return -sum(weight * math.log(shares[name]) for name, weight in weights.items())


def compare(
    mixture: dict[str, np.ndarray],
    alone: dict[str, np.ndarray],
    papers: dict[str, np.ndarray],
    shares: dict[str, float],
    bins: list[tuple[int, int]],
) -> dict[str, tuple[np.ndarray | float, np.ndarray | float]]:
    """The excess of a mixture's model over models of one category on the same windows, each value with its error.

    Args:
        mixture, alone: category -> (N, T) nats; the categories of `alone` are compared, weighted by their shares.
        papers: category -> (N,) the paper of each window; shares: category -> p_c, of all categories mixed.
        bins: ranges of positions for the curve.
    """
    total = sum(shares[name] for name in alone)
    weights = {name: shares[name] / total for name in alone}
    excess = {name: mixture[name] - alone[name] for name in alone}

    def mean(statistic, values=excess):
        return over_categories({name: statistic(x) for name, x in values.items()}, papers, weights)

    return {
        "excess_curve": mean(lambda x: binned(x, bins)),
        "tail_excess": mean(tail_mean),
        "area": mean(area),
        "area_above_tail": mean(area_above_tail),
        "tail_loss_of_one": mean(tail_mean, alone),
        "bound": (bound(shares, weights), 0.0),
        "H": (entropy(shares), 0.0),
    }
