"""Pre-pretrain a causal language model on a curriculum of graph search, before it sees any text.

    python build_data_splits.py --scratch_dir S --max_input_size 384 --max_lookahead 64        # first, once
    accelerate launch --num_processes 8 pptrain.py --scratch_dir S \
        --data_dir S/data/nl_splits/mis384_look64_seed12345 --max_steps 100000

Stage s trains on graphs whose answer is up to s - 1 steps ahead. Once the last --curr_window training examples are answered
right often enough, the next stage begins; the run ends after the last. Row j of step s is example s * effective_batch + j of
the stage, drawn from (seed, stage, index) alone, so any number of processes trains on the same examples and advances at the
same steps, and a stopped run goes on exactly where it was: run the same command again.

Reads   DATA_DIR (build_data_splits.py): what is never trained on, and the held-out examples
Writes  SCRATCH_DIR/pptrain/{run.json, events.jsonl, logs/*.jsonl, checkpoints/step_*, final/}, and
        problematic_batch.pt where a loss or gradient was not finite
Exits   0 when finished, 75 when stopped by SIGTERM, SIGUSR1 or Ctrl-C with a checkpoint written (see README)
"""

from lm.imports import end_of_imports  # first: it acts while the others are imported

# isort: split
import copy
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lm.session
from lm.args import Precision, below, check, outside_0_to_1, parse
from lm.curriculum import next_stage
from lm.graph_search import Task
from lm.graph_tokens import Encoder
from lm.heldout import HeldOut, encode_subset, teacher_forced
from lm.ledger import Columns, Ledger
from lm.loss import packed_loss
from lm.micro_batch_size import with_micro_batch
from lm.micro_batches import Loader, rows_of_step
from lm.models import architecture, build_model, num_parameters
from lm.packing import Batch, Loss, attention_reach, pack, row_ids, sees_only_itself
from lm.profiling import part
from lm.run import EXIT_STOPPED, Run, beside, open_run, run_and_exit, start_accelerator
from lm.schedule import Schedule, ScheduleName
from lm.session import Made, Session
from lm.splits import Splits, read_splits
from lm.step import plan_batch
from lm.tokenizer import fingerprint, load_tokenizer, special_ids
from lm.trainer_args import MicroBatch, TrainerArgs, compile_blocks, fall_back, optimizer_of
from synthetic import SyntheticExamples, share_too_long

end_of_imports()


@dataclass(frozen=True, kw_only=True)
class Args(TrainerArgs):
    """One run of the curriculum."""

    scratch_dir: str
    """Folder that all of this line of work lives under."""
    output_dir: str = ""
    """Folder of the run; SCRATCH_DIR/pptrain by default."""
    data_dir: str
    """Folder that build_data_splits.py wrote."""
    max_steps: int
    """Optimizer steps at most; the run ends earlier when the last stage is passed."""

    model: str = "pythia-160m"
    tokenizer: str = "EleutherAI/pythia-160m"
    """A folder with tokenizer.json, or a hub name; fetch_samples.py writes the same one to samples/tokenizer_neox."""
    generator: str | None = None
    """module:Class with the interface of NaturalLanguageGraphGenerator, instead of the built-in generator."""
    max_input_size: int | None = None
    """Size of the task, in symbols; that of --data_dir, which it must equal."""
    max_lookahead: int | None = None
    """Number of stages; that of --data_dir, which it must equal."""
    seq_len: int = 2048
    """Tokens in the longest example that trains; longer ones are left out and counted, never cut."""
    max_left_out: float = 0.05
    """Share of the last stage's examples that may be longer than --seq_len; more, and the run does not begin."""

    loss: Loss = "weighted"
    """weighted: all tokens, the answer half of each example's weight; answer_only: the answer's tokens and EOS alone."""
    micro_batch: MicroBatch = 2
    """Examples in one forward pass of one process; they are packed, so a pass costs its tokens and no padding. auto: as many as
    fit into the free memory if all are of --seq_len tokens; it needs --effective_batch."""
    grad_accum: int | None = None
    """Forward passes in one optimizer step; 2, or what follows from --effective_batch."""
    lr: float = 5e-4
    schedule: ScheduleName = "constant"
    warmup_steps: int = 1000
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_beta2: float = 0.999
    precision: Precision = "bf16"

    start_stage: int = 1
    """First stage; with the last one, there is no curriculum."""
    stage_step: int = 1
    """Stages to go up at once."""
    curr_window: int = 200
    """Latest training examples whose share of right answers is looked at; it begins anew with each stage."""
    curr_check_every: int = 200
    """Optimizer steps between looks."""
    curr_threshold: float = 0.98
    """Share of right answers, over a full window, that ends a stage."""
    eval_subset_size: int = 500
    """Held-out examples, the same at every evaluation."""
    log_every: int = 10
    """Optimizer steps between records."""
    checkpoint_interval_steps: int = 200
    """Optimizer steps between checkpoints: at most so many are repeated after a kill."""
    num_workers: int = 1
    """Processes beside each trainer that make the next examples; 0 makes them in the trainer, which then waits."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults()
        found += below(self, 1, "max_steps", "seq_len", "start_stage", "stage_step", "curr_window", "curr_check_every")
        found += below(self, 1, "eval_subset_size", "log_every")
        found += below(self, 0, "num_workers")
        found += outside_0_to_1(self, "curr_threshold", "max_left_out")
        if self.micro_batch == "auto" and self.effective_batch is None:
            found.append("--micro_batch auto without --effective_batch, of which it is a part: pass it")
        if self.schedule == "gpt3":
            found.append("--schedule gpt3 counts tokens, of which a step of the curriculum has no fixed number: pass another")
        return found


@dataclass(frozen=True)
class Plan:
    """What follows from the arguments, the data, the model and the number of processes."""

    task: Task
    examples: SyntheticExamples  # of any stage
    held_out: HeldOut
    grad_accum: int
    effective_batch: int  # examples in a step
    reach: float | None  # how to pack (lm/packing.py)
    schedule: Schedule


@dataclass
class Progress(lm.session.Progress):
    """Of this trainer: where the curriculum is, and what has been counted."""

    stage: int = 1
    recent: list[bool] = field(default_factory=list)  # whether the latest examples of this stage were answered right
    tokens: int = 0  # targets in the examples trained on
    too_long: int = 0  # examples left out because they are longer than seq_len

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among the latest examples."""
        return sum(self.recent) / len(self.recent) if self.recent else None


# What may change between a run and its continuation: nothing here enters the weights (the split of a batch does only as float
# order). The names of model and tokenizer are free, what they stand for is not.
FREE = {"output_dir", "scratch_dir", "data_dir", "resume_from", "force_cpu", "deterministic", "detect_anomaly", "max_steps"}
FREE |= {"checkpoint_interval_steps", "max_step_checkpoints", "wandb_project", "wandb_run_name", "num_workers", "tokenizer"}
FREE |= {"model", "log_every", "ledger", "dirty", "profile", "compile"}
FREE |= {"micro_batch", "grad_accum", "effective_batch", "max_input_size", "max_lookahead", "max_left_out"}


def identity(
    args: Args, plan: Plan, splits: Splits, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
) -> dict[str, Any]:
    """What makes two runs the same run; a checkpoint only continues a run with the same."""
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    files = {name: about["sha256"] for name, about in splits.meta["files"].items()}
    settings |= {"effective_batch": plan.effective_batch, "task": asdict(plan.task), "data": files}
    settings |= {"generator": splits.meta["generator"], "architecture": architecture(model)}
    if args.schedule != "constant":
        settings["max_steps"] = args.max_steps
    return settings | {"tokenizer": fingerprint(tokenizer), "eos_token_id": tokenizer.eos_token_id}


def at_stage(examples: SyntheticExamples, stage: int) -> SyntheticExamples:
    """The same examples of another stage."""
    examples = copy.copy(examples)
    examples.stage = stage
    return examples


def make_micro_batch(
    args: Args, examples: SyntheticExamples, rows: range, stage: int, reach: float | None
) -> Batch | tuple[Batch, Columns]:
    """These examples of a stage, packed; with --ledger, and what it says of their rows."""
    examples = at_stage(examples, stage)
    made = examples.examples(rows.start, len(rows))
    batch = pack(made.ids, made.answer_tokens, args.loss, reach)
    batch |= {"num_too_long": torch.tensor(made.num_too_long)}
    if not args.ledger:
        return batch
    return batch, {"example": np.array(rows), "stage": np.full(len(rows), examples.stage)}


def train(args: Args, plan: Plan, session: Session, loader: Loader) -> int:
    """Train until the last stage is passed or the steps are made (returns 0) or a signal asks to stop (EXIT_STOPPED)."""
    run, accelerator = session.run, session.accelerator
    ledger, waited = Ledger(run, args.ledger, row_ids), 0.0
    while not is_done(args, plan, session.progress):
        step, data_step = session.progress.step, session.progress.data_step
        if step == 0:
            evaluate(args, plan, session)
        lr = args.lr * plan.schedule.factor(step)
        before = time.perf_counter()
        with part("data"):
            micro_batches = loader.step(data_step, session.progress.stage, plan.reach)
        waited += time.perf_counter() - before
        micro_batches = ledger.note(micro_batches)
        weight = sum(batch["weights"].sum(dtype=torch.float64).item() for batch in micro_batches)
        counts = [sum(int(batch[name].sum()) for batch in micro_batches) for name in ("lengths", "num_too_long")]
        with part("to_device"):
            micro_batches = send_to_device(micro_batches, accelerator.device, non_blocking=True)
        source = functools.partial(sources, data_step, session.progress.stage, plan, args, accelerator)
        step += 1
        logging, looking = (step % every == 0 or step == args.max_steps for every in (args.log_every, args.curr_check_every))
        how = {"beta1": plan.schedule.beta1(step - 1), "look": logging or looking, "also": counts}
        steps = session.make_step(micro_batches, weight, lr, args.max_grad_norm, source, **how)
        if steps is None:
            ledger.forget()
            session.end_rollback()
            continue
        account(session.progress, args, steps, accelerator)
        for made in steps:
            ledger.write(made.step, made.data_step)
        progress = session.progress
        passed = step % args.curr_check_every == 0 and stage_is_passed(progress, args)
        if logging or passed:
            result = steps[-1].result
            values = {"curr_acc": progress.accuracy, "stage": progress.stage, "alpha": progress.stage / plan.task.max_lookahead}
            values |= {"grad_norm": result.grad_norm, "too_long": progress.too_long, "wait_sec": round(waited, 4)}
            run.log.train(step, progress.tokens, steps[-1].time, loss=result.loss, lr=lr, **values)
            waited = 0.0
        if passed:
            evaluate(args, plan, session)
            progress.stage = next_stage(progress.stage, args.stage_step, plan.task.max_lookahead)
            progress.recent = []
        if session.end_step(is_done(args, plan, progress)):
            return EXIT_STOPPED
    return 0


def is_done(args: Args, plan: Plan, progress: Progress) -> bool:
    """Whether the last stage is passed, or all steps are made."""
    return progress.stage > plan.task.max_lookahead or progress.step >= args.max_steps


def stage_is_passed(progress: Progress, args: Args) -> bool:
    """Whether a full window of examples of this stage was answered right often enough."""
    return len(progress.recent) == args.curr_window and progress.accuracy >= args.curr_threshold


def account(progress: Progress, args: Args, steps: Sequence[Made], accelerator: Accelerator) -> None:
    """Add what all processes saw in these steps: right and wrong answers in the order of rows, targets, examples left out."""
    if not steps:
        return
    right = torch.stack([torch.stack(made.result.outcomes) for made in steps])  # (steps, micro-batches, examples)
    counts = torch.tensor([made.also for made in steps], device=accelerator.device)
    own = torch.cat([right.long().flatten(1), counts], dim=1)
    everyone = accelerator.gather(own[None]).cpu().numpy()  # (processes, steps, ...)
    flags = everyone[:, :, : -counts.shape[1]].reshape(accelerator.num_processes, *right.shape)
    # micro-batch m of process p holds the rows after those of process p - 1: see rows_of_step
    progress.recent = (progress.recent + flags.transpose(1, 2, 0, 3).astype(bool).flatten().tolist())[-args.curr_window :]
    progress.tokens += int(everyone[:, :, -2].sum())
    progress.too_long += int(everyone[:, :, -1].sum())


def sources(data_step: int, stage: int, plan: Plan, args: Args, accelerator: Accelerator) -> list[list[dict]]:
    """The examples of this process as text, for each micro-batch of a step."""
    examples = at_stage(plan.examples, stage)
    rows_of_each = rows_of_step(data_step, args.micro_batch, plan.grad_accum, accelerator)
    return [examples.texts(rows.start, len(rows)) for rows in rows_of_each]


@part("evaluate")
def evaluate(args: Args, plan: Plan, session: Session) -> None:
    """Measure accuracy and loss on the held-out examples, which are of full difficulty whatever the stage."""
    stage = session.progress.stage
    accuracy, loss = teacher_forced(session.bare, plan.held_out, session.accelerator, args.precision, plan.reach)
    values = {"heldout_acc": accuracy, "heldout_loss": loss, "num_examples": plan.held_out.num_rows}
    session.run.log.evaluation(session.progress.step, stage=stage, alpha=stage / plan.task.max_lookahead, **values)


def about(progress: Progress) -> dict[str, Any]:
    """What the folder of a model says of it."""
    return {"step": progress.step, "tokens": progress.tokens, "stage": progress.stage, "too_long": progress.too_long}


def check_fit(args: Args, task: Task, share: float, longest: int, held_out: HeldOut) -> None:
    """Raise ValueError, all faults together, unless the stages exist and their examples fit into --seq_len."""
    faults = []
    if args.start_stage > task.max_lookahead:
        faults.append(f"--start_stage {args.start_stage}: {args.data_dir} has stages 1 to {task.max_lookahead}")
    if share > args.max_left_out:
        faults.append(
            f"--seq_len {args.seq_len} is too short for {share:.1%} of the last stage's examples (the longest of 1,000 has"
            f" {longest} tokens), --max_left_out {args.max_left_out} is allowed: pass a longer --seq_len, or allow more"
        )
    if not held_out.num_rows:
        faults.append(f"--seq_len {args.seq_len} is too short for all held-out examples: pass a longer one")
    check(faults)


def say_what_to_know(run: Run, args: Args, plan: Plan, share: float) -> None:
    """What surprises those who do not know it."""
    task = plan.task
    if task.reachable_lookahead < task.max_lookahead:
        run.log.say(
            f"--max_lookahead {task.max_lookahead} names the stages: at --max_input_size {task.max_input_size} the longest"
            f" lookahead is {task.reachable_lookahead}, and stage s asks for up to s - 1"
        )
    if share:
        left_out, of = plan.held_out.num_too_long, plan.held_out.num_too_long + plan.held_out.num_rows
        run.log.say(
            f"{share:.1%} of the last stage's examples are longer than --seq_len {args.seq_len} and will be left out,"
            f" and so are {left_out} of the {of} held-out examples"
        )
    if plan.reach is None:
        run.log.say(f"--model {args.model} lets packed examples see each other: every example gets a row of its own, padded")


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, before anything of it is written."""

    args: Args
    accelerator: Accelerator
    splits: Splits
    tokenizer: PreTrainedTokenizerFast
    plan: Plan
    loader: Loader
    model: PreTrainedModel
    share_too_long: float  # of the last stage's examples
    longest: int  # tokens in one of them


def make_model(args: Args, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """With random weights."""
    torch.manual_seed(args.seed)
    return build_model(args.model, len(tokenizer), args.seq_len, special_ids(tokenizer), args.dropout)


def prepare(args: Args) -> Prepared:
    """Encode held-out examples while the model is built. Raises: ValueError or FileNotFoundError for whatever does not fit."""
    args = replace(args, output_dir=args.output_dir or str(Path(args.scratch_dir) / "pptrain"))
    check(args.faults())
    args = fall_back(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes are forked after its first use
    accelerator = start_accelerator(args.precision, args.force_cpu)
    tokenizer = load_tokenizer(args.tokenizer)
    of_model = args.model, len(tokenizer), args.seq_len
    args = with_micro_batch(args, args.effective_batch, *of_model, accelerator, packed=True)
    grad_accum = 2 if args.grad_accum is None and args.effective_batch is None else args.grad_accum
    grad_accum, effective = plan_batch(args.micro_batch, grad_accum, args.effective_batch, accelerator.num_processes)
    splits = read_splits(args.data_dir, args.max_input_size, args.max_lookahead, args.generator)
    task = splits.task
    encoder = Encoder(tokenizer)
    examples = SyntheticExamples(
        task, args.seed, reserved=splits.reserved, generator=args.generator, tokenizer=encoder, seq_len=args.seq_len
    )
    share, longest = share_too_long(task, task.max_lookahead, encoder, args.seq_len, generator=args.generator)
    make = functools.partial(make_micro_batch, args, examples)
    loader = Loader(make, args.micro_batch, grad_accum, args.num_workers, accelerator)
    building = beside(lambda: make_model(args, tokenizer))
    held_out = encode_subset(splits.rows("eval"), args.eval_subset_size, args.seed, tokenizer, args.seq_len)
    check_fit(args, task, share, longest, held_out)
    model = building.result()
    reach = attention_reach(model) if sees_only_itself(model) else None
    schedule = args.lr_schedule(args.max_steps, tokens_per_step=1)
    plan = Plan(task, examples, held_out, grad_accum, effective, reach, schedule)
    compile_blocks(args, model)
    return Prepared(args, accelerator, splits, tokenizer, plan, loader, model, share, longest)


def main(args: Args) -> int:
    """Train one run and return its exit code."""
    ready = prepare(args)
    args, splits, tokenizer, plan, model = ready.args, ready.splits, ready.tokenizer, ready.plan, ready.model
    task, held_out = plan.task, plan.held_out
    derived = {
        "max_input_size": task.max_input_size,
        "stages": task.max_lookahead,
        "reachable_lookahead": task.reachable_lookahead,
        "effective_batch": plan.effective_batch,
        "micro_batch": args.micro_batch,
        "grad_accum": plan.grad_accum,
        "total_steps": args.max_steps,
        "share_too_long": ready.share_too_long,
        "longest_example": ready.longest,
        "held_out_examples": held_out.num_rows,
        "held_out_too_long": held_out.num_too_long,
        "packed": plan.reach is not None,
        "positions": getattr(model.config, "max_position_embeddings", None),
        "vocab_size": len(tokenizer),
        "num_parameters": num_parameters(model),
    }
    with open_run(args, derived, ready.accelerator) as run:
        run.log.say("  ".join(f"{key} {value}" for key, value in derived.items()))
        say_what_to_know(run, args, plan, ready.share_too_long)
        begins = plan.examples, range(args.micro_batch), args.start_stage, plan.reach
        sample = make_micro_batch(replace(args, ledger=False), *begins)
        start, same_run = Progress(stage=args.start_stage), identity(args, plan, splits, tokenizer, model)
        session = Session(args, run, model, optimizer_of(args, model), packed_loss, sample, start, same_run)
        session.resume()
        code = train(args, plan, session, ready.loader)
        if code == 0:
            session.finish(tokenizer, about(session.progress))
            run.log.say(f"{session.progress.too_long} examples were left out because they are longer than --seq_len")
        run.close()
    return code


if __name__ == "__main__":
    run_and_exit(main, parse(Args))
