"""Models compared each at its own best learning rate: runs over models, learning rates and seeds, alike in all else.

A comparison at one learning rate says which model it suits. Here each is trained at every rate of a sweep with every seed, and
the means over seeds are compared where each model is best. Choosing the best of several means favours noise, for both alike;
the seeds' spread says how much of it there is.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm.excess import over_runs
from lm.pretraining import Pretraining

SWEPT = {"lr", "num_parameters"}  # settings in which the runs may differ, beside the seed and the name of the model


@dataclass(frozen=True)
class Arm:
    """One model's held-out losses, in nats per token, at the end of its runs."""

    model: str
    parameters: int
    losses: dict[float, dict[int, float]]  # by learning rate and seed; infinite if the run diverged

    def mean(self, lr: float) -> tuple[float, float]:
        """Mean and standard error over seeds; the latter NaN for a single one, and where a run diverged."""
        if math.inf in self.losses[lr].values():
            return math.inf, math.nan
        mean, error = over_runs(np.array(list(self.losses[lr].values())), np.full(1, math.nan))
        return float(mean), float(error)

    @property
    def best_lr(self) -> float:
        """The learning rate with the lowest mean."""
        return min(self.losses, key=lambda lr: self.mean(lr)[0])

    @property
    def at_the_edge(self) -> bool:
        """Whether a rate that was not tried may be better."""
        return self.best_lr in (min(self.losses), max(self.losses))


def read_arms(runs: Sequence[Pretraining]) -> list[Arm]:
    """The arms of a sweep, in the order in which their models come first.

    Raises: ValueError, all faults together, if runs differ in something else, lack a partner at some rate and seed, are one run
        twice, or if there is no rate at which none of a model's runs diverged.
    """
    first, faults, by_model = runs[0], [], defaultdict(lambda: defaultdict(dict))
    for run in runs:
        settings = {name: value for name, value in run.settings.items() if name not in SWEPT}
        others = {name: value for name, value in first.settings.items() if name not in SWEPT}
        if differing := [name for name in settings | others if settings.get(name) != others.get(name)]:
            faults.append(
                f"{run.folder} differs from {first.folder} in {', '.join(differing)}, no more than models, rates and seeds"
                " may differ: leave it out"
            )
        if not (run.finished or run.diverged):
            faults.append(f"{run.folder} is at step {run.last_step}, not finished: wait for it, or leave it out")
        args = run.run["args"]
        cell = by_model[args["model"]][float(args["lr"])]
        if args["seed"] in cell:
            faults.append(f"{run.folder} is a second run of {args['model']}, lr {args['lr']:g}, seed {args['seed']}: pass one")
        elif run.held_out:
            cell[args["seed"]] = math.inf if run.diverged else run.held_out[-1]["c4_loss"]
    cells = {(lr, seed) for losses in by_model.values() for lr, cell in losses.items() for seed in cell}
    if len({frozenset(seed for at, seed in cells if at == lr) for lr, _ in cells}) > 1:
        faults.append("the learning rates have not all the same seeds: make the runs that are missing, or leave some out")
    for model, losses in by_model.items():
        there = {(lr, seed) for lr, cell in losses.items() for seed in cell}
        if missing := sorted(cells - there):
            lr, seed = missing[0]
            faults.append(f"{len(missing)} runs of {model} are missing (the first: lr {lr:g}, seed {seed}): make them")
        if all(math.inf in cell.values() for cell in losses.values()):
            faults.append(f"runs of {model} diverged at each learning rate: try lower ones")
    if faults:
        raise ValueError("\n".join(faults))
    parameters = {run.run["args"]["model"]: run.run["derived"]["num_parameters"] for run in runs}
    return [
        Arm(model, parameters[model], {lr: dict(sorted(cell.items())) for lr, cell in sorted(losses.items())})
        for model, losses in by_model.items()
    ]


def compare(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """For each arm: its best learning rate, its loss there, and the difference to the first arm, paired by seed."""
    base = arms[0].losses[arms[0].best_lr]
    rows = []
    for arm in arms:
        own = arm.losses[arm.best_lr]
        difference = over_runs(np.array([own[seed] - base[seed] for seed in base]), np.full(1, math.nan))
        rows.append(
            {
                "model": arm.model,
                "parameters": arm.parameters,
                "best_lr": arm.best_lr,
                "at_the_edge": arm.at_the_edge,
                "loss": arm.mean(arm.best_lr),
                "difference": tuple(map(float, difference)),
                "seeds": len(own),
            }
        )
    return rows


def in_words(arms: Sequence[Arm], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was found, and what limits it."""
    said = []
    for row in rows[1:]:
        difference, error = row["difference"]
        lower = "lower" if difference < 0 else "higher"
        sure = f" +- {error:.4f}" if math.isfinite(error) else ""
        said.append(
            f"{row['model']} at lr {row['best_lr']:g} ends {abs(difference):.4f}{sure} nats per token {lower} than"
            f" {rows[0]['model']} at lr {rows[0]['best_lr']:g} ({row['seeds']} seeds)"
        )
    said += [
        f"warning: the best learning rate of {row['model']}, {row['best_lr']:g}, is at the edge of the sweep: widen it"
        for row in rows
        if row["at_the_edge"]
    ]
    return said
