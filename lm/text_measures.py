"""What the likelihood of a text says of a model: perplexities, beside those of a model that finds all ids equally likely.

With log-likelihoods l_i in nats of the texts i, n in number, each of t_i tokens, w_i words and b_i bytes, and V ids:

    perplexity       exp(-sum l_i / n)        of LAMBADA, where a text is the last word; chance exp(sum t_i ln V / n)
    word_perplexity  exp(-sum l_i / sum w_i)  of whole documents; chance has -t_i ln V for l_i, as have
    byte_perplexity  exp(-sum l_i / sum b_i), bits_per_byte its logarithm to base 2, and loss, in nats per token

lm-eval computes them so. Standard errors are between texts, by the delta method. Plain numpy, float64.
"""

import math
from collections.abc import Sequence

import numpy as np

from lm.measure import ratio_and_se

Measures = dict[str, dict[str, float | None]]  # {measure: value, se (None for a single text), chance}


def text_summary(rows: Sequence[dict], primary: str, vocab_size: int) -> dict:
    """The measures of the texts of one task. Args: vocab_size: ids of the tokenizer, for what chance would give."""
    measures = (last_word_measures if "greedy" in rows[0] else document_measures)(rows, vocab_size)
    counts = {"num_items": len(rows), "num_cut": sum(row["cut"] for row in rows)}
    return {**counts, "chance": measures[primary]["chance"], "measures": measures}


def last_word_measures(rows: Sequence[dict], vocab_size: int) -> Measures:
    """Of "log_likelihood", "greedy" (whether each token was the likeliest) and "num_tokens" of each last word."""
    right = np.array([row["greedy"] for row in rows], np.float64)
    ones = np.ones(len(rows))
    likelihoods, uniform = _likelihoods(rows, vocab_size)
    acc = {**_rate(right, ones), "chance": float(np.exp(uniform).mean())}
    return {
        "primary_metric": acc,
        "acc": acc,
        "perplexity": _exp(_rate(-likelihoods, ones)) | {"chance": _safe_exp(-uniform.mean())},
    }


def document_measures(rows: Sequence[dict], vocab_size: int) -> Measures:
    """Of "log_likelihood", "num_tokens", "num_words" and "num_bytes" of each document."""
    likelihoods, uniform = _likelihoods(rows, vocab_size)
    words, num_bytes, tokens = (
        np.array([row[name] for row in rows], np.float64) for name in ("num_words", "num_bytes", "num_tokens")
    )
    per_word, per_byte, per_token = (_rate(-likelihoods, sizes) for sizes in (words, num_bytes, tokens))
    by_chance = {name: -uniform.sum() / sizes.sum() for name, sizes in (("word", words), ("byte", num_bytes))}
    in_bits = {name: None if value is None else value / math.log(2) for name, value in per_byte.items()}
    return {
        "word_perplexity": _exp(per_word) | {"chance": _safe_exp(by_chance["word"])},
        "byte_perplexity": _exp(per_byte) | {"chance": _safe_exp(by_chance["byte"])},
        "bits_per_byte": in_bits | {"chance": by_chance["byte"] / math.log(2)},
        "loss": per_token | {"chance": math.log(vocab_size)},
    }


def _likelihoods(rows: Sequence[dict], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The model's, and those of one that finds all ids equally likely."""
    tokens = np.array([row["num_tokens"] for row in rows], np.float64)
    return np.array([row["log_likelihood"] for row in rows], np.float64), -tokens * math.log(vocab_size)


def _rate(sums: np.ndarray, sizes: np.ndarray) -> dict[str, float | None]:
    value, se = ratio_and_se(sums, sizes)
    return {"value": float(value), "se": float(se) if len(sums) > 1 else None}


def _exp(rate: dict[str, float | None]) -> dict[str, float | None]:
    value = _safe_exp(rate["value"])
    return {"value": value, "se": None if rate["se"] is None else value * rate["se"]}


def _safe_exp(value: float) -> float:
    """As large as a float can be where exp would pass it: a model may find a text of bytes that are no words impossible."""
    return math.exp(min(value, 700.0))
