"""Find a learning rate for a trainer's model and data, before it trains (the range test of Smith, arXiv 1506.01186).

    python find_lr.py --scratch_dir S --model gpt-mini-v0                       # of pretrain.py
    accelerate launch --num_processes 8 find_lr.py pptrain --scratch_dir S --data_dir S/data/nl_splits/mis384_look64_seed12345
    python find_lr.py train --K 5 --min_lr 1e-6 --max_lr 1

The first word names the trainer (pretrain without one), and what follows are its own arguments, beside those of the test: its
command line can be pasted here as it is. The test makes that trainer's first steps, on the same rows with the same
optimizer, clipping, precision and dropout, but with a learning rate that rises from --min_lr to --max_lr, until the loss
diverges. No run comes of it, and none is touched: the weights are thrown away.

Reads   what the trainer reads
Writes  LR_DIR/lr_range.{png,csv,json}: the plot, the loss at each learning rate, and three suggestions or why there are none
Exits   0, or 1 when no learning rate can be suggested
"""

import csv
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel

import pptrain
import pretrain
import train
from lm.args import below, check, not_positive
from lm.files import whole_file, write_json
from lm.loss import mixed_loss, next_token_loss, packed_loss
from lm.lr_range import FEWEST_STEPS, Curve, Suggestions, range_test, rates, smooth, suggest
from lm.micro_batches import rows_of_step
from lm.models import num_parameters
from lm.plots import lr_range_figure
from lm.provenance import read_tree
from lm.run import main_decides, run_and_exit, set_numerics
from lm.step import LossSum, settle
from lm.trainer_args import fall_back, optimizer_of

LABELS = {"steepest": "steepest descent", "valley": "middle of the descent", "minimum_tenth": "minimum / 10"}


@dataclass(frozen=True, kw_only=True)
class RangeArgs:
    """The test itself."""

    lr_dir: str = ""
    """Folder of plot, CSV and JSON; by default OUTPUT_DIR_lr, without --output_dir SCRATCH_DIR/find_lr/MODEL (of train.py
    find_lr/MODEL)."""
    min_lr: float = 1e-7
    """Learning rate of the first step."""
    max_lr: float = 10.0
    """And of the last, unless the loss diverges before it."""
    num_steps: int = 100
    """Optimizer steps, each with the same multiple of the learning rate before it."""
    smoothing: float = 0.98
    """Share that the smoothed loss keeps of itself at each step."""
    diverged: float = 4.0
    """The test ends when the smoothed loss is more than this many times its minimum."""

    def range_faults(self) -> list[str]:
        """Everything that is wrong with these values."""
        found = below(self, FEWEST_STEPS, "num_steps") + not_positive(self, "min_lr")
        if not self.min_lr < self.max_lr:
            found.append(f"--max_lr {self.max_lr:g} with --min_lr {self.min_lr:g}: more than that is needed")
        if not 0 <= self.smoothing < 1:
            found.append(f"--smoothing {self.smoothing}: a number from 0 to less than 1 is needed")
        if not self.diverged > 1:
            found.append(f"--diverged {self.diverged:g}: more than 1 is needed")
        return found


@dataclass(frozen=True, kw_only=True)
class OfTrain(train.Args, RangeArgs):
    """A learning rate for train.py: the arguments of the test, then those of the trainer."""

    output_dir: str = ""
    """Folder that the run will have; nothing is read or written there."""


@dataclass(frozen=True, kw_only=True)
class OfPptrain(pptrain.Args, RangeArgs):
    """A learning rate for pptrain.py: the arguments of the test, then those of the trainer."""

    output_dir: str = ""
    """Folder that the run will have; nothing is read or written there."""
    max_steps: int | None = None
    """Of the run; the test makes --num_steps."""


@dataclass(frozen=True, kw_only=True)
class OfPretrain(pretrain.Args, RangeArgs):
    """A learning rate for pretrain.py: the arguments of the test, then those of the trainer."""

    output_dir: str = ""
    """Folder that the run will have; nothing is read or written there."""
    total_steps: int | None = None
    """Of the run; the test makes --num_steps."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults()
        if self.fsdp:
            found.append("--fsdp is not for find_lr.py, which tries rates on whole models: leave it out")
        return found


@dataclass(frozen=True)
class Trial:
    """A trainer's beginning."""

    accelerator: Accelerator
    model: PreTrainedModel
    loss_sum: LossSum
    steps: Iterator[tuple[list[Any], float]]  # this process's micro-batches of each step, on the device, and their weight
    data: str  # what it trains on, in a few words
    effective_batch: int


def of_train(args: OfTrain) -> Trial:
    """Windows of papers."""
    ready = train.prepare(replace(args, upload_results_to_s3=False))
    plan, accelerator = ready.plan, ready.accelerator
    weight = plan.tokens_per_step / accelerator.num_processes

    def steps() -> Iterator[tuple[list[Any], float]]:
        for step in itertools.count():
            yield send_to_device(ready.loader.step(step), accelerator.device), weight

    data = f"{', '.join(plan.train.categories)} of {args.data_dir}"
    return Trial(accelerator, ready.model, next_token_loss, steps(), data, plan.effective_batch)


def of_pptrain(args: OfPptrain) -> Trial:
    """Examples of the first stage."""
    ready = pptrain.prepare(replace(args, max_steps=args.num_steps))
    plan, accelerator = ready.plan, ready.accelerator

    def steps() -> Iterator[tuple[list[Any], float]]:
        for step in itertools.count():
            micro_batches = ready.loader.step(step, args.start_stage, plan.reach)
            weight = sum(batch["weights"].sum(dtype=torch.float64).item() for batch in micro_batches)
            yield send_to_device(micro_batches, accelerator.device), weight

    data = f"stage {args.start_stage} of {Path(args.data_dir).name}"
    return Trial(accelerator, ready.model, packed_loss, steps(), data, plan.effective_batch)


def of_pretrain(args: OfPretrain) -> Trial:
    """Rows of packed text and of synthetic examples."""
    ready = pretrain.prepare(replace(args, total_steps=args.num_steps, epochs=None))
    plan, accelerator, pack = ready.plan, ready.accelerator, ready.plan.mixed.pack
    needed, _ = plan.mixed.drawn(args.num_steps * plan.effective_batch)
    if needed > pack.num_blocks and not pack.finished:
        raise ValueError(f"{pack.folder} has {pack.num_blocks} blocks so far, {needed} are needed: wait for more of them")
    again = needed > pack.num_blocks  # which prepare has refused without --allow_epochs
    pass_blocks = pack.num_blocks if again or args.shuffle else None
    weight = plan.effective_batch * pack.seq_len / accelerator.num_processes

    def steps() -> Iterator[tuple[list[Any], float]]:
        for step in itertools.count():
            samples = rows_of_step(step, ready.args.micro_batch, plan.grad_accum, accelerator)
            micro_batches = [plan.mixed.rows(rows, pass_blocks) for rows in samples]
            yield send_to_device(micro_batches, accelerator.device), weight

    return Trial(accelerator, ready.model, mixed_loss, steps(), str(pack.folder), plan.effective_batch)


TRAINERS: dict[str, tuple[type, Callable[[Any], Trial]]] = {
    "pretrain": (OfPretrain, of_pretrain),
    "pptrain": (OfPptrain, of_pptrain),
    "train": (OfTrain, of_train),
}


def parse(argv: list[str]) -> OfTrain | OfPptrain | OfPretrain:
    """The command line as the arguments of the trainer that its first word names; pretrain if it names none."""
    if not {*argv[:1]} & {*TRAINERS, "-h", "--help"}:
        argv = ["pretrain", *argv]
    kinds = {name: kind for name, (kind, _) in TRAINERS.items()}
    return tyro.extras.subcommand_cli_from_dict(kinds, args=argv, use_underscores=True)


def results_folder(args: OfTrain | OfPptrain | OfPretrain) -> Path:
    """Where the results go. Raises: ValueError if that is the folder of a run."""
    scratch = Path(getattr(args, "scratch_dir", "."))
    beside_run = f"{args.output_dir.rstrip('/')}_lr" if args.output_dir else scratch / "find_lr" / Path(args.model).name
    folder = Path(args.lr_dir or beside_run)
    if (folder / "run.json").exists():
        raise ValueError(f"{folder} is the folder of a run, another one is needed: pass another --lr_dir")
    return folder


def write_results(folder: Path, trainer: str, args: Any, trial: Trial, curve: Curve, found: Suggestions) -> None:
    """Plot, CSV and JSON."""
    smoothed = smooth(curve.losses, args.smoothing).tolist()
    with whole_file(folder / "lr_range.csv") as partial, open(partial, "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "lr", "loss", "smoothed", "grad_norm"])
        rows.writerows(zip(itertools.count(1), curve.lrs, curve.losses, smoothed, curve.grad_norms))
    suggested = {name: getattr(found, name) for name in LABELS}
    if curve.losses:
        title = f"{args.model}, {trainer}.py on {trial.data}, effective batch {trial.effective_batch}, {args.optimizer}"
        marks = {LABELS[name]: lr for name, lr in suggested.items() if lr is not None}
        lr_range_figure(folder / "lr_range.png", curve.lrs, curve.losses, smoothed, marks, title)
    about = {"suggestions": suggested, "refusal": found.refusal, "warning": found.warning}
    about |= {"steps_made": len(curve.losses), "stopped": curve.stopped, "trainer": f"{trainer}.py", "data": trial.data}
    about |= {"effective_batch": trial.effective_batch, "num_processes": trial.accelerator.num_processes}
    about |= {"num_parameters": num_parameters(trial.model), **read_tree(dirty=True).record, "args": asdict(args)}
    write_json(folder / "lr_range.json", about)


def main(args: OfTrain | OfPptrain | OfPretrain) -> int:
    """Test, write what was seen, and return the exit code."""
    check(args.range_faults())
    args = fall_back(args)
    trainer, begin = next((name, begin) for name, (kind, begin) in TRAINERS.items() if isinstance(args, kind))
    folder = results_folder(args)
    trial = begin(replace(args, output_dir=str(folder), resume_from="auto", ledger=False))  # where no run can be gone on with
    accelerator, loss_sum = trial.accelerator, trial.loss_sum
    set_numerics(args)
    model, optimizer = accelerator.prepare(trial.model, optimizer_of(args, trial.model))
    first = next(trial.steps)
    settle(accelerator, model, first[0][0], loss_sum)
    steps, lrs = itertools.chain([first], trial.steps), rates(args.min_lr, args.max_lr, args.num_steps)
    clipping, ending = {"max_grad_norm": args.max_grad_norm}, {"beta": args.smoothing, "diverged": args.diverged}
    curve = range_test(accelerator, model, optimizer, steps, loss_sum, lrs, **clipping, **ending, seed=args.seed)
    found = suggest(curve.lrs, curve.losses, args.num_steps, args.smoothing)
    main_decides(accelerator, lambda: write_results(folder, trainer, args, trial, curve, found))
    if accelerator.is_main_process:
        say(found, curve, folder)
    return 1 if found.refusal else 0


def say(found: Suggestions, curve: Curve, folder: Path) -> None:
    """Print what was found."""
    if curve.stopped:
        print(f"ended after {len(curve.losses)} steps: {curve.stopped}")
    if found.warning:
        print(f"warning: {found.warning}")
    if found.refusal:
        print(f"no learning rate is suggested: {found.refusal}")
    else:
        print("  ".join(f"{label} {getattr(found, name):.2g}" for name, label in LABELS.items()))
    print(f"{folder}/lr_range.png, .csv, .json")


if __name__ == "__main__":
    run_and_exit(main, parse(sys.argv[1:]))
