"""Train a causal language model from random weights on random windows of the papers of K categories.

The question: how does loss fall with context as the mixture grows?

    python train.py --K 1 --seed 0 --token_budget 200_000_000 --output_dir runs/K1_seed0
    accelerate launch --num_processes 8 train.py --K 5 --seed 0 --token_budget 200_000_000 --output_dir runs/K5_seed0

Row j of step s is example s * effective_batch + j of the run's windows, so any number of processes and any split of the same
effective batch trains on the same windows, and a stopped run goes on exactly where it was: run the same command again.

Reads   DATA_DIR (fetch_arxiv.py)
Writes  OUTPUT_DIR/{run.json, events.jsonl, logs/*.jsonl, checkpoints/step_*, best/, final/}, and
        problematic_batch.pt where a loss or gradient was not finite
Exits   0 when finished, 75 when stopped by SIGTERM, SIGUSR1 or Ctrl-C with a checkpoint written (see README)
"""

from lm.imports import end_of_imports  # first: it acts while the others are imported

# isort: split
import functools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lm.session
from lm.args import below, check, not_positive, outside_0_to_1, parse
from lm.ledger import Columns, Ledger
from lm.loss import next_token_loss
from lm.measure import mean_loss
from lm.micro_batch_size import with_micro_batch
from lm.micro_batches import Loader, rows_of_step
from lm.models import architecture, build_model, num_parameters
from lm.papers import Papers, read_papers
from lm.profiling import part
from lm.run import EXIT_STOPPED, beside, open_run, run_and_exit, start_accelerator
from lm.s3 import S3Folder
from lm.schedule import Schedule, ScheduleName, evaluations_since_best, plateau_factor
from lm.session import Session
from lm.step import plan_batch
from lm.tokenizer import fingerprint, load_tokenizer, special_ids
from lm.trainer_args import MicroBatch, TrainerArgs, compile_blocks, fall_back, optimizer_of
from random_window_dataset import RandomWindowDataset, choose_categories

end_of_imports()
WINDOWS = 512  # in a step, if nothing else is asked for


@dataclass(frozen=True, kw_only=True)
class Args(TrainerArgs):
    """One run of the mixture experiment."""

    K: int
    """Number of categories in the mixture; the same --seed gives nested choices."""
    categories: tuple[str, ...] = ()
    """These K categories instead of K that the seed chooses (a K = 1 run on each is what a mixture is compared with)."""
    data_dir: str = "preprocessed_arxiv"
    """Folder that fetch_arxiv.py wrote."""
    verify_data: bool = False
    """Read all of the data once and compare its checksums before training (sizes and structure are always checked)."""
    sequence_length: int = 100
    """Targets in a window; a window is one token longer."""
    sampling: Literal["random", "permutation"] = "random"
    """random: papers with replacement; permutation: every paper once an epoch."""
    category_weighting: Literal["paper", "token", "equal"] = "paper"
    """What a category's share of the examples is proportional to: its papers, its tokens, or nothing (equal shares)."""
    epochs: float | None = None
    """Passes of one window for each eligible paper; 1 if nothing else says when to end."""
    token_budget: int | None = None
    """Targets to train on in all, rounded down to whole steps; wins over --epochs."""

    model: str = "pythia-70m"
    micro_batch: MicroBatch = 16
    effective_batch: int | None = None
    """Windows in one optimizer step over all processes (512 unless --grad_accum is given)."""
    lr: float = 3e-4
    schedule: ScheduleName = "constant"
    warmup_steps: int = 100
    min_lr_ratio: float = 0.1
    reduce_lr_factor: float = 1.0
    """The learning rate is multiplied by this when the validation loss stops falling; 1.0 turns it off."""
    reduce_lr_patience: int = 5
    """Evaluations without a new best before that."""
    weight_decay: float = 0.01
    adam_beta2: float = 0.95

    steps_per_eval_epoch: int = 100
    """Optimizer steps between evaluations."""
    max_eval_epochs: int | None = None
    """Evaluation periods at most; with neither --token_budget nor --epochs they are the length of the run."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a new best; None never stops early."""
    eval_windows: int = 1024
    """Validation windows, the same at every evaluation."""
    num_workers: int = 0
    """Loader processes beside each trainer; drawing a window takes microseconds, so 0 is fastest."""

    upload_results_to_s3: bool = False
    """Copy the finished run to --s3_bucket."""
    s3_bucket: str | None = None
    """Bucket for the results."""
    s3_prefix: str = "runs"
    """Folder in the bucket; the run's folder name is added."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults()
        found += below(self, 1, "K", "sequence_length", "token_budget", "eval_windows", "steps_per_eval_epoch")
        found += below(self, 1, "max_eval_epochs", "early_stopping_patience")
        found += below(self, 0, "reduce_lr_patience", "num_workers")
        found += not_positive(self, "epochs")
        found += outside_0_to_1(self, "reduce_lr_factor")
        if self.categories and len(set(self.categories)) != self.K:
            found.append(f"--categories {' '.join(self.categories)} with --K {self.K}: name K different ones, or none")
        if self.upload_results_to_s3 and not self.s3_bucket:
            found.append("--upload_results_to_s3 without --s3_bucket: pass the bucket")
        return found


@dataclass(frozen=True)
class Plan:
    """What follows from the arguments, the data and the number of processes."""

    train: RandomWindowDataset
    validation: np.ndarray  # (eval_windows, sequence_length + 1)
    grad_accum: int
    effective_batch: int  # windows in a step
    tokens_per_step: int
    total_steps: int
    schedule: Schedule


@dataclass
class Progress(lm.session.Progress):
    """Of this trainer: its evaluations decide the learning rate and when to stop."""

    val_losses: list[float] = field(default_factory=list)


def make_plan(args: Args, papers: Papers, num_processes: int) -> Plan:
    """Choose the categories, lay out the batch and count the steps.

    Raises: ValueError if the data does not allow it.
    """
    categories = args.categories or choose_categories(papers.category_names, args.K, args.seed)
    choice = {"sequence_length": args.sequence_length, "target_categories": categories, "seed": args.seed}
    train = RandomWindowDataset(papers, "train", **choice, sampling=args.sampling, category_weighting=args.category_weighting)
    validation = RandomWindowDataset(papers, "validation", **choice, category_weighting=args.category_weighting)
    effective = args.effective_batch or (WINDOWS if args.grad_accum is None else None)
    grad_accum, effective = plan_batch(args.micro_batch, args.grad_accum, effective, num_processes)
    tokens_per_step = effective * args.sequence_length
    limits = []
    if args.max_eval_epochs is not None:
        limits.append(args.max_eval_epochs * args.steps_per_eval_epoch)
    if args.token_budget is not None:
        limits.append(args.token_budget // tokens_per_step)
    elif args.epochs is not None or not limits:
        limits.append(math.ceil(round((args.epochs or 1.0) * len(train) / effective, 6)))
    total_steps = min(limits)
    if total_steps < 1:
        raise ValueError(
            f"--token_budget {args.token_budget} is less than one step of {effective} windows x {args.sequence_length}"
            f" targets: raise it to {tokens_per_step} or more, or lower --effective_batch"
        )
    windows, schedule = validation.windows(0, args.eval_windows), args.lr_schedule(total_steps, tokens_per_step)
    return Plan(train, windows, grad_accum, effective, tokens_per_step, total_steps, schedule)


# What may change between a run and its continuation: nothing here enters a number (the split of a batch does only as float
# order). The number of steps may too, while the learning rate does not depend on it.
FREE = {"output_dir", "resume_from", "force_cpu", "deterministic", "detect_anomaly", "checkpoint_interval_steps"}
FREE |= {"max_step_checkpoints", "wandb_project", "wandb_run_name", "data_dir", "micro_batch", "grad_accum", "effective_batch"}
FREE |= {"ledger", "dirty", "profile", "compile"}
FREE |= {"epochs", "token_budget", "max_eval_epochs", "early_stopping_patience", "num_workers", "verify_data"}
FREE |= {"upload_results_to_s3", "s3_bucket", "s3_prefix", "model"}


def identity(args: Args, plan: Plan, papers: Papers, model: PreTrainedModel) -> dict[str, Any]:
    """What makes two runs the same run; a checkpoint only continues a run with the same."""
    files = {name: papers.meta["files"][name]["sha256"] for name in ("tokens.bin", "index.jsonl", "splits.json")}
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    if args.schedule not in ("constant", "gpt3") or args.reduce_lr_factor != 1.0 or args.early_stopping_patience is not None:
        settings["total_steps"] = plan.total_steps
    settings |= {"categories": plan.train.categories, "effective_batch": plan.effective_batch, "data": files}
    return settings | {"architecture": architecture(model)}


def row_ids(windows: torch.Tensor) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each window."""
    ids = windows.numpy()
    return zip(ids[:, :-1], ids[:, 1:], strict=True)


def noted_windows(windows: RandomWindowDataset, examples: range) -> tuple[torch.Tensor, Columns]:
    """A micro-batch of windows, with what the ledger says of them."""
    drawn, paper, first_token = windows.draw(examples.start, len(examples))
    return torch.from_numpy(drawn), {"example": np.array(examples), "paper": paper, "first_token": first_token}


def make_loader(args: Args, plan: Plan, accelerator: Accelerator) -> Loader:
    """Of windows, or of windows and what the ledger says of them."""
    make = functools.partial(noted_windows, plan.train) if args.ledger else plan.train.__getitems__
    return Loader(make, args.micro_batch, plan.grad_accum, args.num_workers, accelerator)


def train(args: Args, plan: Plan, session: Session, loader: Loader, tokenizer: PreTrainedTokenizerBase) -> int:
    """Train until the plan is done (returns 0) or a signal asks to stop (returns EXIT_STOPPED)."""
    run, accelerator = session.run, session.accelerator
    weight = plan.tokens_per_step / accelerator.num_processes
    ledger = Ledger(run, args.ledger, row_ids, {"paper": plan.train.papers.paper_ids})
    while not is_done(args, plan, session.progress):
        step, data_step = session.progress.step, session.progress.data_step
        lr = args.lr * plan.schedule.factor(step)
        lr *= plateau_factor(session.progress.val_losses, args.reduce_lr_factor, args.reduce_lr_patience)
        with part("data"):
            windows = ledger.note(loader.step(data_step))
        with part("to_device"):
            micro_batches = [batch.to(accelerator.device, non_blocking=True) for batch in windows]
        source = functools.partial(sources, data_step, plan, args, accelerator)
        evaluating = (step + 1) % args.steps_per_eval_epoch == 0 or step + 1 == plan.total_steps
        how = {"beta1": plan.schedule.beta1(step), "look": evaluating}
        steps = session.make_step(micro_batches, weight, lr, args.max_grad_norm, source, **how)
        if steps is None:
            ledger.forget()
            session.end_rollback()
            continue
        for made in steps:
            ledger.write(made.step, made.data_step)
            norms = {name: getattr(made.result, name) for name in ("grad_norm", "grad_norm_clipped", "param_norm")}
            tokens = made.step * plan.tokens_per_step
            run.log.train(made.step, tokens, made.time, loss=made.result.loss, lr=made.lr, **norms)
        if evaluating:
            evaluate(args, plan, session, tokenizer)
        if session.end_step(is_done(args, plan, session.progress)):
            return EXIT_STOPPED
    return 0


def is_done(args: Args, plan: Plan, progress: Progress) -> bool:
    """Whether all steps are made, or the validation loss has not fallen for long enough."""
    patience, losses = args.early_stopping_patience, progress.val_losses
    stale = patience is not None and evaluations_since_best(losses) >= patience
    return stale or progress.step >= plan.total_steps


def sources(data_step: int, plan: Plan, args: Args, accelerator: Accelerator) -> list[list[tuple[str, int]]]:
    """Paper id and first token of each window of this process, for each micro-batch of a step."""
    rows_of_each = rows_of_step(data_step, args.micro_batch, plan.grad_accum, accelerator)
    return [plan.train.sources(rows) for rows in rows_of_each]


@part("evaluate")
def evaluate(args: Args, plan: Plan, session: Session, tokenizer: PreTrainedTokenizerBase) -> None:
    """Measure the validation loss, and keep the model if it is the best so far."""
    progress = session.progress
    loss = mean_loss(session.bare, plan.validation, args.micro_batch, session.accelerator, args.precision)
    best = loss < min(progress.val_losses, default=math.inf)
    progress.val_losses.append(loss)
    session.run.log.evaluation(progress.step, val_loss=loss, best_val_loss=min(progress.val_losses))
    if best and session.accelerator.is_main_process:
        session.checkpoints.save_model(session.run.folder / "best", session.bare, tokenizer, about(plan, progress))


def about(plan: Plan, progress: Progress) -> dict[str, Any]:
    """What the folder of a model says of it."""
    val_loss = progress.val_losses[-1] if progress.val_losses else None
    return {"step": progress.step, "tokens": progress.step * plan.tokens_per_step, "val_loss": val_loss}


def results_folder(args: Args) -> S3Folder:
    """Where the results go; raises S3Error unless the bucket can be reached."""
    return S3Folder(args.s3_bucket, f"{args.s3_prefix}/{Path(args.output_dir).name}")


def result_files(folder: Path) -> list[str]:
    """Names of a finished run's files, without checkpoints and what belongs to this machine."""
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]  # locks, unfinished files
    return [str(name) for name in names if name.parts[0] not in ("checkpoints", "wandb")]


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, before anything of it is written."""

    args: Args
    accelerator: Accelerator
    papers: Papers
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    loader: Loader
    model: PreTrainedModel


def prepare(args: Args) -> Prepared:
    """Read the data and build the model. Raises: ValueError or FileNotFoundError for whatever does not fit."""
    check(args.faults())
    args = fall_back(args)
    accelerator = start_accelerator(args.precision, args.force_cpu)
    if args.upload_results_to_s3 and accelerator.is_main_process:
        results_folder(args)  # no bucket should be noticed now and not after the last step
    loading = beside(lambda: load_tokenizer(Path(args.data_dir) / "tokenizer"))
    papers = read_papers(args.data_dir, verify=args.verify_data)
    of_model = args.model, papers.meta["vocab_size"], args.sequence_length
    args = with_micro_batch(args, args.effective_batch or WINDOWS, *of_model, accelerator)
    plan = make_plan(args, papers, accelerator.num_processes)
    tokenizer = loading.result()
    if fingerprint(tokenizer) != papers.meta["tokenizer"]["fingerprint"]:
        raise ValueError(f"{papers.folder}/tokenizer did not make {papers.folder}/tokens.bin: run fetch_arxiv.py again")
    loader = make_loader(args, plan, accelerator)
    torch.manual_seed(args.seed)
    vocab_size = papers.meta["vocab_size"]
    model = build_model(args.model, vocab_size, args.sequence_length, special_ids(tokenizer), args.dropout)
    compile_blocks(args, model)
    return Prepared(args, accelerator, papers, tokenizer, plan, loader, model)


def main(args: Args) -> int:
    """Train one run and return its exit code."""
    ready = prepare(args)
    args, accelerator, papers, tokenizer = ready.args, ready.accelerator, ready.papers, ready.tokenizer
    plan, model = ready.plan, ready.model
    derived = {
        "categories": plan.train.categories,
        "category_shares": plan.train.category_shares,
        "eligible_papers": len(plan.train),
        "papers_too_short": plan.train.num_too_short,
        "effective_batch": plan.effective_batch,
        "micro_batch": args.micro_batch,
        "grad_accum": plan.grad_accum,
        "tokens_per_step": plan.tokens_per_step,
        "total_steps": plan.total_steps,
        "vocab_size": papers.meta["vocab_size"],
        "num_parameters": num_parameters(model),
    }
    with open_run(args, derived, accelerator) as run:
        run.log.say("  ".join(f"{key} {value}" for key, value in derived.items()))
        sample, same_run = torch.from_numpy(plan.validation[:1]), identity(args, plan, papers, model)
        session = Session(args, run, model, optimizer_of(args, model), next_token_loss, sample, Progress(), same_run)
        session.resume()
        code = train(args, plan, session, ready.loader, tokenizer)
        if code == 0:
            session.finish(tokenizer, about(plan, session.progress))
        run.close()
    if code == 0 and args.upload_results_to_s3 and accelerator.is_main_process:
        results_folder(args).upload(run.folder, result_files(run.folder))
    return code


if __name__ == "__main__":
    run_and_exit(main, parse(Args))
