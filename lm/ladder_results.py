"""What the models of a ladder reached, recipe by recipe: read from our runs, or from the table that DataDecide published."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from lm.args import check
from lm.checks import COUNT, kind_faults
from lm.comparable import Result, Steps, compared_steps, merge_subjects
from lm.files import read_json
from lm.results_table import read_table
from lm.run_records import read_run
from lm.task_results import read_tasks

TEXTS = "evaluation/final_text_*.json"
TRAINED_ALIKE = ("lr", "effective_batch", "total_steps", "schedule", "optimizer", "weight_decay")


def read_results(path: Path, step: Steps = "last", say: Callable[[str], None] = print) -> list[Result]:
    """One result for each task of each run that can be compared; `say` gets a line on each size where some cannot.

    Args: path: a folder RECIPE/SIZE/seed*/ of runs, a published table, or a folder with its parts.

    Raises: FileNotFoundError if there are no results; ValueError naming the file, and row, that cannot be read.
    """
    folders = sorted(run.parent for run in path.glob("*/*/seed*/run.json"))
    if not folders and not path.exists():
        raise FileNotFoundError(f"no {path}: pass the folder of a ladder (ladder.py run), or a table of results")
    if not folders:
        return merge_subjects(read_table(path, step, say))
    _check_alike(folders)
    results = [result for folder in folders for result in _read_run(folder, say)]
    if not results:
        raise FileNotFoundError(f"no run below {path} has been evaluated: run evaluate_model.py tasks on them")
    chosen = compared_steps(((result.run, result.step) for result in results), step, say)
    return merge_subjects([result for result in results if chosen.get(result.run) == result.step])


def _check_alike(folders: Sequence[Path]) -> None:
    """Raises: ValueError if runs of a size were trained in another way, or some evaluated in another, or on another text."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        args, size = read_run(folder, "pretrain.py")["args"], folder.parent.name
        told = {f"--{name} at {size}": args.get(name) for name in TRAINED_ALIKE}
        for path in [*_tasks_file(folder), *folder.glob(TEXTS)]:
            measured = read_json(path, "evaluate_model.py").get("measured", {})
            told |= {f"{path.name}: {name}": measured[name] for name in measured if name not in ("weights", "versions")}
        if (folder / "results.json").is_file():
            told["--test_documents"] = read_json(folder / "results.json", "pretrain.py").get("test", {}).get("documents")
        for name, value in told.items():
            found[name][str(value)].append(str(folder))
    faults = []
    for name, values in found.items():
        if len(values) > 1:
            where = "; ".join(f"{value:.40} in {', '.join(of)}" for value, of in values.items())
            faults.append(f"{name} differs, {where}: train and evaluate all runs with the same arguments")
    check(faults)


def _read_run(folder: Path, say: Callable[[str], None]) -> list[Result]:
    """The results of RECIPE/SIZE/seed*/, a run of pretrain.py; a run that was not evaluated has none, and a line says so."""
    run = read_run(folder, "pretrain.py")
    measured = {task: measures for path in _tasks_file(folder) for task, measures in read_tasks(path).items()} | _losses(folder)
    if not measured or not (folder / "final").is_dir():
        say(f"{folder} is not {'evaluated' if (folder / 'final').is_dir() else 'finished'}: left out")
        return []
    about, derived = read_json(folder / "final/about.json", "pretrain.py"), run.get("derived")
    faults = kind_faults(folder / "final/about.json", about, {"step": COUNT, "tokens": COUNT})
    check(faults + kind_faults(f"{folder / 'run.json'} derived", derived, {"non_embedding_parameters": COUNT}))
    recipe, size, seed = folder.parts[-3:]
    compute = 6.0 * derived["non_embedding_parameters"] * about["tokens"]
    facts = {"step": about["step"], "tokens": float(about["tokens"]), "compute": compute}
    return [
        Result(recipe=recipe, size=size, seed=seed, task=task, measures=measures, **facts)
        for task, measures in measured.items()
    ]


def _tasks_file(folder: Path) -> list[Path]:
    """The results of tasks, if there are any: of plain questions, or else the only ones.

    Raises: ValueError if questions were only put in several other ways.
    """
    found = sorted(folder.glob("evaluation/final_tasks*.json"))
    if plain := [path for path in found if path.name == "final_tasks.json"]:
        return plain
    if len(found) > 1:
        raise ValueError(f"{folder} has {', '.join(path.name for path in found)}, one is needed: move the others away")
    return found


def _losses(folder: Path) -> dict[str, dict[str, float]]:
    """The loss on texts that are the same for all recipes: those of `evaluate_model.py text`, and the run's test documents.

    Not the loss on held-out text of the recipe itself, which is another text for each.
    """
    found = {path.stem: read_json(path, "evaluate_model.py text") for path in folder.glob(TEXTS)}
    losses = {f"perplexity: {name.removeprefix('final_text_')}": record for name, record in found.items()}
    if (folder / "results.json").is_file():
        results = read_json(folder / "results.json", "pretrain.py")
        losses |= {"perplexity: test": results["test"]} if "test" in results else {}
    return {task: {"loss": float(record["loss"])} for task, record in losses.items()}
