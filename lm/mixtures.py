"""The runs of one experiment over K: found below a folder, checked to be comparable, and compared (`lm.excess` says how)."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.evaluation import Evaluation, read_evaluation
from lm.excess import compare, over_categories, over_runs, tail_mean
from lm.files import read_json
from lm.measure import binned, context_bins


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished, evaluated run."""

    folder: Path
    K: int
    seed: int
    shares: dict[str, float]
    """Category -> its share of the training windows."""
    num_tokens: int | None
    """Trained on, until the checkpoint."""
    settings: dict[str, Any]
    """What must be alike in all runs that are compared."""
    evaluation: Evaluation


def find_results(runs_dir: Path, checkpoint: str, split: str) -> tuple[list[Result], list[str]]:
    """Every evaluated run below the folder, and a line for each that is left out.

    Raises: FileNotFoundError if there is no run, or no evaluated one; ValueError if they cannot be compared.
    """
    if not runs_dir.is_dir():
        raise FileNotFoundError(f"no folder {runs_dir}: pass the one that holds the runs of train.py")
    results, left_out = [], []
    for path in sorted(runs_dir.glob("**/run.json")):
        folder, run = path.parent, read_json(path, "train.py")
        evaluation = folder / "evaluation" / f"{checkpoint}_{split}.json"
        command = f"python evaluate_model.py context {folder} --checkpoint {checkpoint} --split {split}"
        if "K" not in run["args"]:
            continue  # of another experiment
        if not evaluation.is_file():
            unfinished = checkpoint == "final" and not (folder / "final").is_dir()
            what = "is not finished: run its train.py command again" if unfinished else f"is not evaluated: {command}"
            left_out.append(f"{folder} {what}")
            continue
        results.append(_result(folder, run, read_evaluation(evaluation)))
        if missing := sorted(set(results[-1].shares) - set(results[-1].evaluation.losses)):
            left_out.append(f"{folder} is not evaluated on {', '.join(missing)}: {command} --overwrite")
            results.pop()
    if not results:
        nothing = f"no run.json of train.py below {runs_dir}: pass the folder that holds the runs"
        raise FileNotFoundError("\n".join(left_out) or nothing)
    _check_comparable(results)
    return results, left_out


def _result(folder: Path, run: dict, evaluation: Evaluation) -> Result:
    step, per_step = evaluation.record["step"], run["derived"].get("tokens_per_step")
    settings = {name: run["args"].get(name) for name in ("model", "sequence_length", "category_weighting")}
    kept = ("data", "tokenizer", "sequence_length", "num_windows", "seed", "precision")
    return Result(
        folder=folder,
        K=run["args"]["K"],
        seed=run["args"]["seed"],
        shares=run["derived"]["category_shares"],
        num_tokens=step * per_step if step and per_step else None,
        settings=settings | {f"evaluation {name}": evaluation.record["measured"][name] for name in kept},
        evaluation=evaluation,
    )


def _check_comparable(results: list[Result]) -> None:
    faults = []
    for name in results[0].settings:
        folders = defaultdict(list)
        for result in results:
            folders[result.settings[name]].append(str(result.folder))
        if len(folders) > 1:
            faults.append(f"{name} differs: " + "; ".join(f"{value} in {', '.join(of)}" for value, of in folders.items()))
    same = defaultdict(list)
    for result in results:
        same[", ".join(result.shares), result.seed].append(str(result.folder))
    twice = {key: of for key, of in same.items() if len(of) > 1}
    faults += [f"{names} with seed {seed} is there twice: {', '.join(of)}" for (names, seed), of in twice.items()]
    if faults:
        raise ValueError("\n".join([*faults, "runs of one experiment are needed: pass a folder that holds only those"]))


def analyse(result: Result, singles: list[Result]) -> dict[str, Any]:
    """One run: every quantity as (value, standard error over windows); the excess only if K > 1 and a category matches."""
    bins = context_bins(result.settings["evaluation sequence_length"])
    own, papers = _as_float64(result), result.evaluation.papers
    rows = [result.evaluation.record["categories"][name] for name in result.shares]
    num_tokens = np.array([row["num_tokens"] for row in rows])
    test_loss = np.dot([row["loss"] for row in rows], num_tokens) / num_tokens.sum()
    errors = np.array([row["loss_se"] for row in rows], dtype=float)  # None becomes NaN
    test_se = np.sqrt(np.sum((errors * num_tokens) ** 2)) / num_tokens.sum()
    found = {
        "loss_curve": over_categories({name: binned(x, bins) for name, x in own.items()}, papers, result.shares),
        "tail_loss": over_categories({name: tail_mean(x) for name, x in own.items()}, papers, result.shares),
        "test_loss": (test_loss, test_se),
        "perplexity": (np.exp(test_loss), np.exp(test_loss) * test_se),
    }
    of_one = {name: _of_one_category(name, result, singles) for name in result.shares}
    matched = {name: runs for name, runs in of_one.items() if runs}
    if result.K == 1 or not matched:
        return found
    alone = {name: np.mean([_as_float64(single)[name] for single in runs], axis=0) for name, runs in matched.items()}
    found |= compare(own, alone, papers, result.shares, bins)
    return found | {"matched": {name: [str(single.folder) for single in runs] for name, runs in matched.items()}}


def _as_float64(result: Result) -> dict[str, np.ndarray]:
    return {name: result.evaluation.losses[name].astype(np.float64) for name in result.shares}


def _of_one_category(name: str, result: Result, singles: list[Result]) -> list[Result]:
    """The K = 1 runs on just this category: that of the same seed, or else all."""
    there = [single for single in singles if list(single.shares) == [name]]
    for single in there:
        if not np.array_equal(single.evaluation.papers[name], result.evaluation.papers[name]):
            raise ValueError(
                f"{single.folder} and {result.folder} differ in their windows: run evaluate_model.py context --overwrite"
            )
    return [single for single in there if single.seed == result.seed] or there


def by_K(results: list[Result], found: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """For each K the mean over its runs of every quantity, as (value, standard error)."""
    summary = {}
    for K in sorted({result.K for result in results}):
        rows = [row for result, row in zip(results, found, strict=True) if result.K == K]
        keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "matched"]
        pairs = {key: [row[key] for row in rows if key in row] for key in keys}
        summary[K] = {key: over_runs(*map(np.array, zip(*of, strict=True))) for key, of in pairs.items()}
        summary[K]["num_runs"] = len(rows)
    return summary
