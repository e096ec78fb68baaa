"""Do small models tell which recipe trains the better large model? A table of a ladder's results; formulas: `lm.ranking`.

At the target size a task's primary measure decides, as a mean over seeds; at a smaller size each seed predicts by one measure.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.comparable import Result
from lm.ranking import decide, seed_means, seed_noise, spread

PRIMARY = ("primary_metric", "loss")
"""What decides at the target size: accuracy, in the normalisation that the task has in OLMES, or the loss on a text."""
LOWER_IS_BETTER = {"loss"}
SHOWN = tuple(f"{name}_per_char" for name in ("correct_prob", "margin", "norm_correct_prob", "total_prob"))
"""DataDecide's continuous measures, by default per character as there."""


class Ladder:
    """The results as tables: for each size, task and measure a value for each (recipe, seed), NaN where there is none."""

    def __init__(self, results: Sequence[Result]):
        self.recipes = sorted({result.recipe for result in results})
        compute: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
        for result in results:
            compute[result.size][result.recipe, result.seed] = result.compute
        mean = {size: float(np.mean(list(of_size.values()))) for size, of_size in compute.items()}
        self.compute = dict(sorted(mean.items(), key=lambda item: (item[1], item[0])))
        seeds = {size: sorted({seed for _, seed in of_size}) for size, of_size in compute.items()}
        rows = {recipe: number for number, recipe in enumerate(self.recipes)}
        columns = {size: {seed: number for number, seed in enumerate(of_size)} for size, of_size in seeds.items()}
        self.values: dict[tuple[str, str], dict[str, np.ndarray]] = defaultdict(dict)
        for result in results:
            of_task = self.values[result.size, result.task]
            for name, value in result.measures.items():
                table = of_task.setdefault(name, np.full((len(self.recipes), len(seeds[result.size])), np.nan))
                table[rows[result.recipe], columns[result.size][result.seed]] = value

    def primary(self, size: str, task: str) -> str | None:
        """The measure that decides, None if the size has none of the task."""
        return next((name for name in PRIMARY if name in self.values.get((size, task), {})), None)

    def add_averages(self, target: str, tasks: Sequence[str]) -> dict[str, list[str]]:
        """Put beside these tasks the mean over those that have the same primary measure, where they are two or more.

        Returns: the averages' names, and the tasks in each; a run that lacks one of them has no average.
        """
        groups: dict[str, list[str]] = defaultdict(list)
        for task in tasks:
            groups[str(self.primary(target, task))].append(task)
        averages = {
            f"average of {len(of)} {'texts' if by == 'loss' else 'tasks'}": of for by, of in groups.items() if len(of) > 1
        }
        for name, of in averages.items():
            for size in self.compute:
                tables = [self.values.get((size, task), {}) for task in of]
                shared = set.intersection(*map(set, tables))
                self.values[size, name] = {measure: np.mean([t[measure] for t in tables], axis=0) for measure in shared}
        return averages


def decision_table(
    results: Sequence[Result], target: str, metrics: Sequence[str] = (), tasks: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """A row for each smaller size, task and measure; averages over tasks come first, sizes in order of their compute.

    Args:
        target: the size that the others are to predict.
        metrics: measures of the small sizes; default: the primary one and those of `SHOWN`.
        tasks: default: all that the target was measured on.

    Returns: rows with size, compute_share (of the target's), task, measure, decision_accuracy, low, high, num_pairs; of the
        measure at that size num_recipes, num_seeds, noise, spread, spread_to_noise; of the target target_measure, target_noise,
        target_spread. None is what cannot be said.

    Raises: ValueError naming sizes, tasks or measures that there are not, or if there are no two recipes.
    """
    ladder = Ladder(results)
    known = sorted(
        {task for size, task in ladder.values if size == target and ladder.primary(target, task)},
        key=lambda task: (PRIMARY.index(ladder.primary(target, task)), task),
    )
    measures = {name for of_task in ladder.values.values() for name in of_task}
    _refuse_unknown("--target", [target], ladder.compute)
    _refuse_unknown("--tasks", tasks, known)
    _refuse_unknown("--metrics", metrics, sorted(measures))
    smaller = [size for size, compute in ladder.compute.items() if compute < ladder.compute[target]]
    if not smaller:
        raise ValueError(f"no size has less compute than {target}, which is to be predicted: pass another --target")
    chosen = list(dict.fromkeys(tasks)) or known
    rows = []
    for task in [*ladder.add_averages(target, chosen), *chosen]:
        for size in smaller:
            of_task = ladder.values.get((size, task), {})
            shown = metrics or (ladder.primary(target, task), *SHOWN)
            rows += [_row(ladder, size, target, task, measure) for measure in shown if measure in of_task]
    if not any(row["num_pairs"] for row in rows):
        raise ValueError(
            f"no two of the recipes {', '.join(ladder.recipes)} were measured by one task at {target} and at a smaller"
            " size: train and evaluate more runs"
        )
    return rows


def scores(results: Sequence[Result], target: str) -> list[dict[str, Any]]:
    """What each recipe reached at the target size: a row for each recipe and task with mean and deviation over seeds."""
    ladder, rows = Ladder(results), []
    for task in sorted(task for size, task in ladder.values if size == target and ladder.primary(target, task)):
        measure = ladder.primary(target, task)
        for recipe, values in zip(ladder.recipes, ladder.values[target, task][measure], strict=True):
            known = values[np.isfinite(values)]
            deviation = float(known.std(ddof=1)) if len(known) > 1 else None
            if len(known):
                row = {"recipe": recipe, "task": task, "measure": measure, "mean": float(known.mean()), "deviation": deviation}
                rows.append(row | {"seeds": len(known)})
    return rows


def _refuse_unknown(flag: str, names: Sequence[str], known: Any) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{flag} {' '.join(unknown)}: one of {', '.join(known)} is needed")


def _row(ladder: Ladder, size: str, target: str, task: str, measure: str) -> dict[str, Any]:
    deciding = ladder.primary(target, task)
    small, large = ladder.values[size, task][measure], ladder.values[target, task][deciding]
    decision = decide(_upwards(measure, small), _upwards(deciding, seed_means(large)))
    noise, between = seed_noise(small), spread(small)
    row = {
        "size": size,
        "compute_share": ladder.compute[size] / ladder.compute[target],
        "task": task,
        "measure": measure,
        "decision_accuracy": decision.accuracy,
        "low": decision.low,
        "high": decision.high,
        "num_pairs": decision.num_pairs,
        "num_recipes": int(np.isfinite(small).any(1).sum()),
        "num_seeds": int(np.isfinite(small).any(0).sum()),
        "noise": noise,
        "spread": between,
        "spread_to_noise": between / noise if noise else math.nan,
        "target_measure": deciding,
        "target_noise": seed_noise(large),
        "target_spread": spread(large),
    }
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _upwards(measure: str, values: np.ndarray) -> np.ndarray:
    """The values so that higher is better."""
    return -values if measure in LOWER_IS_BETTER else values
