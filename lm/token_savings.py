"""How many tokens of text one setting of pretraining saved against another: the distance between their held-out loss curves.

Let T be the number of C4 tokens that all runs have reached, and L the baseline's held-out loss there. A setting reaches L
where its curve, linear between evaluations, comes down to L for the last time before T: from there on it stays at L or below,
so that a lucky evaluation that the next one takes back does not count. The tokens saved are those with which the baseline
reaches L (T, unless its loss was at L before and never above it since) less those with which the setting does. A setting
that is above L at T has not reached it: how many more tokens it would need, nothing before T tells. One that is at L before it
reads any text saves all of them.

What this does not say: with a learning rate that falls to the end of the run, a run that crosses L in the middle still has a
high one, and would have been lower there had its schedule ended there; so the saving is on the low side of what a run that was
planned shorter would show. If T is before the end of the runs, the baseline had a high learning rate there too, and the saving
is one of unfinished runs. Where the curves cross each other, the saving at another T has another sign. Where they are nearly
flat around L it is uncertain: its error is that of the loss divided by the slope. A line between two evaluations lies above a
curve that bends, so that early differences between runs that were evaluated at different tokens are partly of its making.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.pretraining import Setting


def reached_at(tokens: np.ndarray, loss: np.ndarray, target: float) -> float | None:
    """Where the curve, linear between its points, comes to `target` and stays at it or below up to its end; None if nowhere."""
    above = np.flatnonzero(loss > target)
    if not len(above):
        return float(tokens[0])
    last = above[-1]
    if last == len(loss) - 1:
        return None
    share = (loss[last] - target) / (loss[last] - loss[last + 1])
    return float(tokens[last] + share * (tokens[last + 1] - tokens[last]))


def compare(settings: Sequence[Setting]) -> tuple[int, list[dict[str, Any]]]:
    """The C4 tokens that all runs have reached, and a row for each setting; the first setting is the baseline.

    Means come as (value, standard error), the latter NaN for a single run; tokens are of C4, losses in nats per token.
    """
    equal = min(setting.last_tokens for setting in settings)
    curves = [setting.curve("c4_loss", equal) for setting in settings]
    baseline, baseline_se = curves[0][1][-1], curves[0][2][-1]
    reached = [reached_at(tokens, loss, baseline) for tokens, loss, _ in curves]
    rows = []
    for setting, (_, loss, se), where in zip(settings, curves, reached, strict=True):
        first = setting.runs[0].run
        error = np.nan if setting is settings[0] else np.hypot(se[-1], baseline_se)
        rows.append(
            {
                "setting": setting.label,
                "runs": [run.label for run in setting.runs],
                "pptrain_checkpoint": first["derived"]["pptrain_checkpoint"],
                "mixin_percent": first["args"]["mixin_percent"],
                "c4_tokens": setting.last_tokens,
                "c4_loss": _at_end(setting, "c4_loss"),
                "c4_loss_at_equal_tokens": (loss[-1], se[-1]),
                "difference": (loss[-1] - baseline, error),
                "reached_at": where,
                "tokens_saved": None if where is None else reached[0] - where,
                "heldout_acc": _at_end(setting, "heldout_acc"),
                "heldout_loss": _at_end(setting, "heldout_loss"),
                "finished": all(run.finished for run in setting.runs),
                "step": min(run.last_step for run in setting.runs),
                "total_steps": first["derived"]["total_steps"],
            }
        )
    return equal, rows


def _at_end(setting: Setting, key: str) -> tuple[float, float]:
    _, mean, se = setting.curve(key, setting.last_tokens)
    return mean[-1], se[-1]
