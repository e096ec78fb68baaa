"""What the likelihoods of the choices of a multiple-choice question say of a model: accuracies, and DataDecide's measures.

With log-likelihoods l_i of the choices i, of which c is right, and P_i = exp(l_i) or, per token or per character,
exp(l_i / length_i) (Magnusson et al., DataDecide, arXiv 2504.11393, section 2.3; the names are those of its results table):

    correct_prob       P_c
    margin             P_c - max over i != c of P_i
    norm_correct_prob  P_c / sum_i P_i
    total_prob         sum_i P_i
    acc                1 if the choice with the largest P_i is c, else 0
    acc_uncond         the same by l_i - log P(choice i | "Answer:") (Gu et al., OLMES, arXiv 2406.08446, section 3)

Of choices that are equally likely the first counts as chosen, as in lm-eval and OLMES. Plain numpy, float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One question: what the model makes of each of its choices, and which is right."""

    right: int
    log_likelihoods: Sequence[float]  # nats; -inf is allowed, NaN is not
    num_chars: Sequence[int]
    num_tokens: Sequence[int]
    unconditional: Sequence[float] | None = None  # nats, given "Answer:" alone


def measures_of(asked: Choices) -> dict[str, float]:
    """Every measure of one question; `acc_uncond` only where the unconditional log-likelihoods are known."""
    raw = np.asarray(asked.log_likelihoods, np.float64)
    by = {"": raw, "_per_token": raw / asked.num_tokens, "_per_char": raw / asked.num_chars}
    found = {f"acc{name or '_raw'}": float(scores.argmax() == asked.right) for name, scores in by.items()}
    if asked.unconditional is not None:
        with np.errstate(invalid="ignore"):  # -inf - -inf
            gains = np.where(np.isneginf(raw), -np.inf, raw - asked.unconditional)
        found["acc_uncond"] = float(gains.argmax() == asked.right)
    for name, scores in by.items():
        found |= {f"{measure}{name}": value for measure, value in _probabilities(scores, asked.right).items()}
    return found


def _probabilities(scores: np.ndarray, right: int) -> dict[str, float]:
    """A choice of log-likelihood -800 has probability 0 in float64, and still its share of the sum."""
    probabilities = np.exp(scores)
    best = scores.max()
    shares = np.exp(scores - best) if np.isfinite(best) else np.ones_like(scores)  # nothing is possible: all alike
    return {
        "correct_prob": float(probabilities[right]),
        "margin": float(probabilities[right] - np.delete(probabilities, right).max()),
        "norm_correct_prob": float(shares[right] / shares.sum()),
        "total_prob": float(probabilities.sum()),
    }


def mean_measures(questions: Sequence[Choices], primary: str) -> dict[str, dict[str, float | None]]:
    """{measure: value, its mean over the questions, and se, the standard error of that (None for a single question)}.

    Args:
        primary: the measure that also stands as "primary_metric", first.
    """
    rows = [measures_of(asked) for asked in questions]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    columns = {"primary_metric": columns[primary], **columns}
    root = math.sqrt(len(rows))
    return {
        name: {"value": float(column.mean()), "se": float(column.std(ddof=1)) / root if len(rows) > 1 else None}
        for name, column in columns.items()
    }


def macro_average(parts: Sequence[dict[str, dict[str, float | None]]]) -> dict[str, dict[str, float | None]]:
    """The mean over parts (MMLU's subjects), each counting alike, of what `mean_measures` gives for each."""
    averages = {}
    for name in parts[0]:
        errors = [part[name]["se"] for part in parts]
        se = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(parts)
        averages[name] = {"value": float(np.mean([part[name]["value"] for part in parts])), "se": se}
    return averages


def chance(questions: Sequence[Choices]) -> float:
    """The accuracy that is to be expected of choosing at random."""
    return float(np.mean([1 / len(asked.log_likelihoods) for asked in questions]))
