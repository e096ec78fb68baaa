"""Which data is better, told from small runs: a ladder of recipes x sizes x seeds, planned, run and decided on.

    python ladder.py plan --sizes 4M,6M,8M,10M --recipes recipes/ --seeds 3         # a table: lr, batch, steps, FLOPs, hours
    python ladder.py run --sizes 4M,6M,8M,10M --recipes recipes/ --seeds 3 --tasks sciq,arc_easy --rows samples/tasks
    python ladder.py submit --sizes 4M,6M,8M,10M --recipes recipes/ --seeds 3 --sbatch "--partition=gpu --time=12:00:00"
    python ladder.py decide ladder --target 10M                                     # or DataDecide's published results

What follows " -- " goes to pretrain.py: python ladder.py run --sizes 4M -- --micro_batch 8 --precision fp32

A recipe is a folder that build_pretrain.py wrote (--output_dir recipes/NAME). Each is trained at each size with each seed,
as DataDecide does (Magnusson et al., arXiv 2504.11393): OLMo's architecture, learning rate, batch, warmup and length by their
formulas of the number of parameters. What is done is skipped, and what was stopped goes on where it was.

Reads   RECIPES/*/ (build_pretrain.py); `decide`: LADDER, or the published table (Parquet, CSV, JSON Lines)
Writes  LADDER/plan.json, LADDER/<recipe>/<size>/seed<k>/ (a run of pretrain.py each, with its evaluation/) and .log
        `decide`: decisions.json, .jsonl, .md and .png
Exits   `plan`: 1 if a recipe is too short for it
        `run`: 0 when all is done, 75 when stopped by a signal (the same command goes on), 1 if a run has failed
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from lm.args import below, check, not_positive, parse
from lm.commands import run_command
from lm.decisions import decision_table, scores
from lm.files import whole_file, write_json, write_lines
from lm.ladder_plan import Cell, find_recipes, make_plan, rows_of_plan, too_short
from lm.ladder_results import read_results
from lm.ladder_run import Command, Environment, Runner, is_done
from lm.plots import decisions_figure
from lm.tables import markdown
from lm.trainer_args import setup_of
from pretrain import Args as PretrainArgs

ROOT = Path(__file__).parent
HERE = ("sbatch", "at_once", "cell", "gpus", "workers", "further")  # arguments that no job is told


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Print what would be run: for each size parameters, learning rate, batch, steps, tokens, FLOPs and hours."""

    sizes: str
    """Rungs of the OLMo ladder with commas between (4M ... 1B), or other presets of lm/presets.py."""
    recipes: Path = Path("recipes")
    """Folder of packs, each in a folder of its own, whose name is the recipe's."""
    only: tuple[str, ...] = ()
    """Names of recipes; by default all that are there."""
    seeds: int = 3
    """Runs of each recipe at each size; a seed decides initial weights and the order of the data."""
    ladder: Path = Path("ladder")
    """Folder of all its runs."""
    tokens_per_parameter: float = 100.0
    """Length of each run."""
    tokens: int | None = None
    """Length of each run in tokens, the same for all sizes, instead."""
    batch: int | None = None
    """Rows in a step instead of the formula's, which is for millions of tokens."""
    allow_epochs: bool = False
    """Let runs read a pack more than once if it is too short."""
    further: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Arguments for pretrain.py: those after " -- "."""
    mfu: float = 0.3
    """Share of the peak that training reaches, for the hours."""
    peak_tflops: float = 989.0
    """Of one device in bf16, for the hours: 989 for H100 and H200, 312 for A100."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = below(self, 1, "seeds", "tokens", "batch") + not_positive(self, "tokens_per_parameter", "mfu", "peak_tflops")
        if not self.sizes.strip(","):
            found.append("--sizes is empty: pass rungs such as 4M,6M")
        return found

    def outline(self) -> tuple[list[Cell], list[str]]:
        """The runs of this plan, and which recipes are too short for it.

        Raises: FileNotFoundError or ValueError for what does not fit.
        """
        check(self.faults())
        packs, sizes = find_recipes(self.recipes, self.only), list(dict.fromkeys(_named(self.sizes)))
        cells = make_plan(packs, sizes, self.seeds, self.ladder, self.tokens_per_parameter, self.tokens, self.batch)
        return cells, [] if self.allow_epochs else too_short(packs, cells)

    def cells(self) -> list[Cell]:
        """The runs of this plan. Raises: as `outline`, and ValueError if a recipe is too short."""
        cells, missing = self.outline()
        check(missing)
        return cells


@dataclass(frozen=True, kw_only=True)
class Run(Plan):
    """Run the plan here, several runs at once; what is done is skipped."""

    tasks: str = ""
    """Tasks that each finished model is measured on (evaluate_model.py tasks), with commas between."""
    rows: Path | None = None
    """Folder of the tasks' rows; without it they come from the hub."""
    limit: int | None = None
    """Questions of each task, the first; by default all."""
    num_fewshot: int = 0
    """Answered examples before each question; DataDecide has 5."""
    texts: tuple[str, ...] = ()
    """NAME=FILE of texts on which the loss of each finished model is measured (evaluate_model.py text)."""
    gpus: str | None = None
    """Ids of the GPUs with commas between; by default CUDA_VISIBLE_DEVICES, or all that there are."""
    processes_per_run: int = 1
    """Processes of each run, with a GPU of its own each if there are GPUs."""
    per_gpu: int = 1
    """Runs that share a GPU, if they fit into its memory; small models leave most of one idle."""
    workers: int = 1
    """Runs at once where there is no GPU."""
    cell: int | None = None
    """Run only this one, by its number in plan.json: what a task of a SLURM array does."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults() + below(self, 1, "processes_per_run", "per_gpu", "workers", "limit")
        found += below(self, 0, "num_fewshot")
        if self.per_gpu > 1 and self.processes_per_run > 1:
            found.append("--per_gpu and --processes_per_run are both above 1: share GPUs among runs, or spread runs over them")
        if max(self.per_gpu, self.workers) > 1 and pretrain_args(self).micro_batch == "auto":
            found.append("--micro_batch auto with runs that share memory, of which each would take all: pass a number after --")
        for text in self.texts:
            name, _, file = text.partition("=")
            if not name or not file or not Path(file).exists():
                found.append(f"--texts {text}: NAME=FILE of a file that exists is needed")
        return found


@dataclass(frozen=True, kw_only=True)
class Submit(Run):
    """Submit the plan to SLURM as one array, a task for each run that is not done."""

    sbatch: str = ""
    """Further options of sbatch in one string; they override those in scripts/ladder_job.sh."""
    at_once: int | None = None
    """Tasks that run at the same time, at most."""


@dataclass(frozen=True, kw_only=True)
class Decide:
    """Say how often the smaller sizes choose the better of two recipes, as the target size ranks them."""

    results: tyro.conf.Positional[Path]
    """Folder of a ladder, or the published results: a Parquet, CSV or JSON Lines file, or a folder of Parquet files."""
    target: str
    """Size that tells which of two recipes is better."""
    tasks: str = ""
    """Tasks with commas between; by default all that were measured."""
    measures: str = ""
    """Measures of the small sizes with commas between; by default that which decides at the target, and DataDecide's four."""
    step: Literal["last", "common"] = "last"
    """Of each size the last step that every recipe has reached with one seed, or with all."""
    output_dir: Path | None = None
    """Where the answers go; by default RESULTS, or the folder of the file."""


def plan(args: Plan) -> int:
    """Print the plan, and write it down; also one that cannot be run yet, for that is how one learns what to pack."""
    cells, missing = args.outline()
    write_plan(args, cells)
    print(markdown(rows_of_plan(cells, args.peak_tflops, args.mfu)))
    print(f"hours of one device of {args.peak_tflops:g} TFLOP/s at {args.mfu:.0%}; runs one by one in {args.ladder}/plan.json")
    for line in missing:
        print(line)
    return 1 if missing else 0


def write_plan(args: Plan, cells: Sequence[Cell]) -> None:
    """Write LADDER/plan.json: every run with its number."""
    args.ladder.mkdir(parents=True, exist_ok=True)
    told = []
    for number, cell in enumerate(cells):
        paths = {"pack": str(cell.pack), "folder": str(cell.folder)}
        costs = {"tokens": cell.tokens, "flops": cell.flops, "hours": cell.hours(args.peak_tflops, args.mfu)}
        told.append({"cell": number, "name": cell.name} | asdict(cell) | paths | costs)
    write_json(args.ladder / "plan.json", told)


def commands(args: Run, cell: Cell) -> list[Command]:
    """What is to be done for a cell: train, then measure."""
    settings = cell.settings() | {"scratch_dir": args.ladder, "sample_every": 0, "allow_epochs": args.allow_epochs}
    launch = [sys.executable] + [str(ROOT / "scripts/launch_on_node.py")] * (args.processes_per_run > 1)
    own = [f"--{key}" if value is True else f"--{key}={value}" for key, value in settings.items() if value is not False]
    done = [[*launch, str(ROOT / "pretrain.py"), *own, *args.further]]
    measure = [sys.executable, str(ROOT / "evaluate_model.py")]
    if args.tasks:
        options = [f"--{name}={getattr(args, name)}" for name in ("rows", "limit", "num_fewshot") if getattr(args, name)]
        done.append([*measure, "tasks", str(cell.folder), f"--tasks={args.tasks}", *options])
    for text in args.texts:
        name, _, file = text.partition("=")
        done.append([*measure, "text", str(cell.folder), f"--documents={file}", f"--name={name}"])
    return done


def slots(args: Run, cells: Sequence[Cell]) -> list[Environment]:
    """The environment of each of the runs at once. Raises: ValueError if there are too few GPUs, or they are too small."""
    visible = args.gpus if args.gpus is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(n) for n in range(torch.cuda.device_count())] if visible is None else [g for g in visible.split(",") if g]
    each, cores = args.processes_per_run, len(os.sched_getaffinity(0))
    if gpus and torch.cuda.is_available():
        if len(gpus) < each:
            raise ValueError(f"--processes_per_run {each}, but there are {len(gpus)} GPUs: pass fewer")
        check_memory(args, cells, torch.cuda.get_device_properties(0).total_memory)
        groups = [gpus[n : n + each] for n in range(0, len(gpus) - each + 1, each)]
        found = [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups for _ in range(args.per_gpu)]
    else:
        found = [{} for _ in range(args.workers)]
    for number, slot in enumerate(found):
        slot["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (len(found) * each)))
        if each > 1:
            slot.update(one_node(number, each, "CUDA_VISIBLE_DEVICES" in slot))
    return found


def one_node(number: int, processes: int, on_gpus: bool) -> Environment:
    """What scripts/launch_on_node.py, which passes signals on, is told of a run that has this machine alone."""
    job = {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    job |= {"SLURM_JOB_ID": str(os.getpid() * 100 + number), "PROCESSES_PER_NODE": str(processes)}  # the number gives a port
    job["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return job | ({"SLURM_GPUS_ON_NODE": str(processes)} if on_gpus else {})


def check_memory(args: Run, cells: Sequence[Cell], memory: int) -> None:
    """Raises: ValueError if --per_gpu runs of the largest size do not fit into `memory` bytes together."""
    largest, training = max(cells, key=lambda cell: cell.all_parameters), pretrain_args(args)
    # On paper on a CPU: a GPU need not be there, and it takes a little more.
    each = setup_of(training, largest.seq_len, args.processes_per_run, torch.device("cpu"), device_bytes=float(memory))
    if (needed := args.per_gpu * largest.memory(each)) > memory:
        raise ValueError(
            f"--per_gpu {args.per_gpu} runs of {largest.size} need about {needed / 2**30:.0f} GiB, a GPU has"
            f" {memory / 2**30:.0f}: pass fewer, or a smaller one after -- --micro_batch"
        )


def pretrain_args(args: Plan) -> PretrainArgs:
    """What every run is told after " -- "."""
    return parse(PretrainArgs, [f"--scratch_dir={args.ladder}", *args.further])


def run(args: Run) -> int:
    """Do what is not done yet, and say what became of it."""
    cells = args.cells()
    if args.cell is None:
        write_plan(args, cells)
    elif 0 <= args.cell < len(cells):
        cells = [cells[args.cell]]
    else:
        raise ValueError(f"--cell {args.cell}: the plan has cells 0 to {len(cells) - 1}")
    work = [(cell, commands(args, cell)) for cell in cells]
    left = [(cell, todo) for cell, todo in work if not is_done(cell, todo)]
    print(f"{len(work)} runs, {len(work) - len(left)} done before")
    if not left:
        return 0
    training = left[0][1][0]
    parse(PretrainArgs, training[training.index(str(ROOT / "pretrain.py")) + 1 :])  # says now what is wrong after " -- "
    return Runner(slots(args, [cell for cell, _ in left]), lambda text: print(text, flush=True)).run(left)


def submit(args: Submit) -> int:
    """Hand the runs that are not done to sbatch; returns its exit code."""
    if shutil.which("sbatch") is None:
        raise RuntimeError("no sbatch here, a SLURM cluster is needed: log in to it, or use ladder.py run")
    if Path.cwd() != ROOT:
        raise ValueError(f"submitted from {Path.cwd()}, {ROOT} is needed, where jobs run: go there, and pass paths from there")
    cells = args.cells()
    write_plan(args, cells)
    left = [number for number, cell in enumerate(cells) if not is_done(cell, commands(args, cell))]
    if not left:
        print("nothing to do: all runs are done")
        return 0
    recipes = tuple(dict.fromkeys(cell.recipe for cell in cells))
    args = replace(args, only=recipes)  # one that is made later must change no number
    array = ",".join(map(str, left)) + (f"%{args.at_once}" if args.at_once else "")
    words: list[str] = []
    for key, value in asdict(args).items():
        if key in HERE or value in (None, False, "", ()):
            continue
        words += [f"--{key}", *value] if isinstance(value, tuple) else [f"--{key}" if value is True else f"--{key}={value}"]
    words += ["--", *args.further] if args.further else []
    devices = f"--gres=gpu:{args.processes_per_run}"
    command = ["sbatch", f"--array={array}", devices, *shlex.split(args.sbatch), "scripts/ladder_job.sh", *words]
    print(shlex.join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def decide(args: Decide) -> None:
    """Read, compare, draw, write, and say what was found."""
    results = read_results(args.results, args.step)
    rows = decision_table(results, args.target, _named(args.measures), _named(args.tasks))
    reached = scores(results, args.target)
    folder = args.output_dir or (args.results if args.results.is_dir() else args.results.parent)
    folder.mkdir(parents=True, exist_ok=True)
    decisions_figure(folder / "decisions.png", rows, args.target)
    write_json(folder / "decisions.json", {"target": args.target, "rows": rows, "scores": reached})
    write_lines(folder / "decisions.jsonl", rows)
    table = f"{markdown(rows_of_scores(reached))}\n\n{markdown(rows_of_decisions(rows))}"
    with whole_file(folder / "decisions.md") as partial:
        partial.write_text(f"# Decisions, as {args.target} ranks the recipes\n\n{table}\n\n![decisions](decisions.png)\n")
    print(f"{table}\nfigure: {folder}/decisions.png, results: {folder}/decisions.json, .jsonl, .md")


def rows_of_scores(reached: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the recipes reached as cells of a table, a line for each task: means, and deviations over seeds."""
    recipes = list(dict.fromkeys(row["recipe"] for row in reached))
    lines: dict[str, dict[str, str]] = {}
    for row in reached:
        deviation = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        lines.setdefault(f"{row['task']} ({row['measure']})", {})[row["recipe"]] = f"{row['mean']:.3f}{deviation}"
    return [["task", *recipes], *([task, *(of.get(recipe, "-") for recipe in recipes)] for task, of in lines.items())]


def _named(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def rows_of_decisions(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The decisions as cells of a table."""
    cells = [["task", "size", "compute", "measure", "decision accuracy", "95 % interval", "pairs", "spread / seed noise"]]
    for row in rows:
        shown = [f"{row[key]:.2f}" if row[key] is not None else "-" for key in ("decision_accuracy", "low", "high")]
        ratio = "-" if row["spread_to_noise"] is None else f"{row['spread_to_noise']:.2g}"
        first = [row["task"], row["size"], f"{100 * row['compute_share']:.2g} %", row["measure"]]
        cells.append([*first, shown[0], f"{shown[1]} to {shown[2]}", str(row["num_pairs"]), ratio])
    return cells


def main(argv: list[str] | None = None) -> int:
    """Do what the first argument names; returns the exit code."""
    own = sys.argv[1:] if argv is None else argv
    cut = own.index("--") if "--" in own else len(own)
    further = {"further": tuple(own[cut + 1 :])}
    commands = {name: (kind, lambda args, do=do: do(replace(args, **further))) for name, (kind, do) in OF_PLANS.items()}
    return run_command(commands | {"decide": (Decide, decide)}, own[:cut])


OF_PLANS = {"plan": (Plan, plan), "run": (Run, run), "submit": (Submit, submit)}

if __name__ == "__main__":
    sys.exit(main())
