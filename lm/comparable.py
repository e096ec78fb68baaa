"""Which results of a ladder are compared: those of about one step within a size, MMLU as one task.

Seeds may have ended early (in DataDecide two of three at a quarter of the compute, at sizes other than 1B; Magnusson et al.,
arXiv 2504.11393). Each size has one step at which it is compared: the last that every recipe reached with one seed at least
(`common`: with all of its seeds). Of each run the checkpoint nearest to it counts if it is within 5 %; other runs are left
out, and a line says which.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

NEAR = 0.05  # of the size's step
GROUP, SUBJECT = "mmlu", "mmlu_"
"""The subjects of MMLU count as one task, their mean, as in OLMES (Gu et al., arXiv 2406.08446)."""

Steps = Literal["last", "common"]


class Run(NamedTuple):
    """One model of the ladder. Seeds are names, which mean something within a size only ("default", "small aux 2", "seed0")."""

    recipe: str
    size: str
    seed: str


@dataclass(frozen=True, kw_only=True)
class Result:
    """One task measured on one checkpoint."""

    recipe: str
    size: str
    seed: str
    step: int
    tokens: float
    """Trained on until then."""
    compute: float
    """FLOPs until then, 6 x parameters x tokens, where the input embedding does not count as parameters."""
    task: str
    measures: dict[str, float]

    @property
    def run(self) -> Run:
        return Run(self.recipe, self.size, self.seed)


def compared_steps(cells: Iterable[tuple[Run, int]], step: Steps, say: Callable[[str], None]) -> dict[Run, int]:
    """The step at which each run is compared, for those that have one near their size's."""
    sizes: dict[str, dict[Run, set[int]]] = defaultdict(lambda: defaultdict(set))
    for run, at in cells:
        sizes[run.size][run].add(at)
    chosen = {}
    for size, runs in sizes.items():
        ends: dict[str, list[int]] = defaultdict(list)
        for run, steps in runs.items():
            ends[run.recipe].append(max(steps))
        end = min((max if step == "last" else min)(of_recipe) for of_recipe in ends.values())
        nearest = {run: min(steps, key=lambda at: (abs(at - end), at)) for run, steps in runs.items()}
        kept = {run: at for run, at in nearest.items() if abs(at - end) <= NEAR * end}
        chosen |= kept
        if left_out := Counter(run.seed for run in runs if run not in kept):
            seeds = ", ".join(f"seed {seed} of {number} recipes" for seed, number in sorted(left_out.items()))
            say(f"{size} is compared at step {end}, left out without a checkpoint near it: {seeds}")
        if (last := max(map(max, ends.values()))) > end * (1 + NEAR):
            who = "recipes" if step == "last" else "runs"
            say(f"{size} is compared at step {end}, some {who} have results up to step {last}, others have not")
    return chosen


def merge_subjects(results: Sequence[Result]) -> list[Result]:
    """The results with the mean over the subjects of MMLU as one task, where all subjects were measured."""
    subjects: dict[Run, list[Result]] = defaultdict(list)
    for result in results:
        if result.task.startswith(SUBJECT):
            subjects[result.run].append(result)
    merged = [result for result in results if not result.task.startswith(SUBJECT)]
    names = {result.task for of_run in subjects.values() for result in of_run}
    there = {result.run for result in merged if result.task == GROUP}
    for run, of_run in subjects.items():
        if run not in there and len(of_run) == len(names):
            shared = set.intersection(*(set(result.measures) for result in of_run))
            means = {name: float(np.mean([result.measures[name] for result in of_run])) for name in sorted(shared)}
            merged.append(replace(of_run[0], task=GROUP, measures=means))
    return merged
