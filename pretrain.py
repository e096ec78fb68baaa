"""Pretrain a causal language model on packed text: from random weights, or from a pre-pretrained one with synthetic examples.

    python build_pretrain.py --scratch_dir S --total_steps 10000 --effective_batch 32        # first; or beside the training
    accelerate launch --num_processes 8 pretrain.py --scratch_dir S --total_steps 10000 --effective_batch 32       # text alone
    accelerate launch --num_processes 8 pretrain.py --scratch_dir S --data_dir S/data/nl_splits/mis384_look64_seed12345 \
        --pptrain_checkpoint latest --total_steps 10000 --mixin_percent 0.02

Row j of step s is sample s * effective_batch + j: with probability --mixin_percent the next synthetic example, else the next
block of the pack. Both are functions of (data, seed, sample) alone, so any number of processes trains on the same rows, and a
stopped run goes on exactly where it was: run the same command again. The defaults follow Hu et al. (arXiv 2502.19249).

Reads   SCRATCH_DIR/data/c4_packed (build_pretrain.py; it may still be packing, and is waited for), DATA_DIR
        (build_data_splits.py), SCRATCH_DIR/pptrain (pptrain.py)
Writes  SCRATCH_DIR/pretrain/{run.json, events.jsonl, logs/*.jsonl, checkpoints/step_*, final/, results.json}, and
        problematic_batch.pt where a loss or gradient was not finite
Exits   0 when finished, 75 when stopped by SIGTERM, SIGUSR1 or Ctrl-C with a checkpoint written (see README)
"""

from lm.imports import end_of_imports  # first: it acts while the others are imported

# isort: split
import bisect
import functools
import math
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import lm.session
from lm import draws
from lm.args import Precision, below, check, not_positive, parse
from lm.beginning import Beginning, choose_beginning, load_beginning
from lm.corpus import File, digest, find_files
from lm.estimate import estimate, operations
from lm.graph_tokens import check_tokenizer
from lm.heldout import HeldOut, encode_subset, teacher_forced
from lm.ledger import Ledger
from lm.loss import MEASURED, means, mixed_loss
from lm.measure import mean_loss
from lm.micro_batch_size import with_micro_batch
from lm.micro_batches import rows_of_step
from lm.mixed_rows import MixedRows, Mixture, row_ids, text_rows
from lm.models import architecture, build_model, non_embedding_parameters, num_parameters, on_paper
from lm.packing import Batch, Loss, attention_reach, sees_only_itself
from lm.presets import GPT, PRESETS
from lm.profiling import part
from lm.results import has_results, loss_and_perplexity, write_results
from lm.run import EXIT_STOPPED, beside, main_decides, open_run, run_and_exit, start_accelerator
from lm.schedule import Schedule, ScheduleName
from lm.session import Made, Session
from lm.shards import Pack
from lm.splits import Splits, open_splits
from lm.step import plan_batch
from lm.supply import check_supply, look_again, too_few, wait_for_blocks
from lm.text_evaluation import text_loss
from lm.tokenizer import fingerprint, load_tokenizer, special_ids
from lm.trainer_args import LargeModelArgs, MicroBatch, fall_back, lay_out_memory, optimizer_of, setup_of
from lm.writing import prompt_ids, write

end_of_imports()

WORTH_AN_ESTIMATE = 1e12  # operations: half a minute of one CPU core


@dataclass(frozen=True, kw_only=True)
class Args(LargeModelArgs):
    """One pretraining run."""

    scratch_dir: str
    """Folder that all of this line of work lives under."""
    output_dir: str = ""
    """Folder of the run; SCRATCH_DIR/pretrain by default."""
    c4_dir: str = ""
    """Folder that build_pretrain.py wrote, or is writing; SCRATCH_DIR/data/c4_packed by default."""
    data_dir: str = ""
    """Folder that build_data_splits.py wrote. With --mixin_percent 0 it may be left out: nothing synthetic is measured then."""
    pptrain_checkpoint: str | None = None
    """What to begin with. latest: of SCRATCH_DIR/pptrain; a folder: a run of pptrain.py, one of its checkpoints, or another
    model with its tokenizer; none: random weights. By default latest with --data_dir, else none. A run that goes on keeps what
    it began with."""
    total_steps: int | None = None
    """Optimizer steps; by default what --epochs says."""
    epochs: float | None = None
    """Passes over the pack instead of --total_steps, rounded down to whole steps; 1 if neither is given."""

    model: str = "pythia-160m"
    seq_len: int | None = None
    """Targets in a row; that of the pack, which it must equal."""
    allow_epochs: bool = False
    """Train on blocks again, in another order, once all have been trained on; without it, a pack that is too short is
    refused. --epochs above 1 says it too."""
    shuffle: bool = False
    """Take the blocks in an order of the --seed's, in the first pass too, which a finished pack allows; by default they come as
    they were packed."""
    verify_data: bool = False
    """Compare all checksums of the pack before training; by default each shard's when it is first read."""
    max_wait_sec: float = 3600.0
    """Longest wait for a new shard of a pack that is not finished, in seconds."""

    mixin_percent: float | None = None
    """Probability, from 0 to 1, that a row is a synthetic example; .02 with --data_dir, else 0."""
    mixin_loss: Loss = "answer_only"
    """answer_only: an example's answer and EOS alone train; weighted: all of it, the answer half of its weight. Either way its
    row counts as much as a row of text."""
    micro_batch: MicroBatch = 4
    effective_batch: int | None = None
    """Rows in one optimizer step over all processes; by default 32, or what the journal had for its presets (gpt-*)."""
    lr: float = 5e-4
    schedule: ScheduleName = "cosine"
    warmup_steps: int = 1000
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_beta2: float = 0.999
    precision: Precision = "bf16"
    ignore_estimate: bool = False
    """Begin also where the estimate of the memory says that it will not do."""

    eval_every: int = 500
    """Optimizer steps between evaluations."""
    eval_blocks: int = 64
    """Held-out blocks of text, the same at every evaluation; all if the pack has fewer."""
    eval_subset_size: int = 500
    """Held-out synthetic examples, the same at every evaluation."""
    log_every: int = 10
    """Optimizer steps between records."""
    sample_every: int | None = None
    """Optimizer steps between texts that the model writes (logs/samples.jsonl); by default at each evaluation, 0 for none."""
    sample_prompt: str = ""
    """What these texts go on from; by default the beginning of a document."""
    sample_tokens: int = 50
    """Tokens of such a text; fewer where they would not fit into a block."""
    test_documents: tuple[str, ...] = ()
    """Files (as build_pretrain.py reads them) whose perplexity is measured at the end, for results.json."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults()
        found += below(self, 1, "total_steps", "seq_len", "eval_every", "eval_blocks", "eval_subset_size", "log_every")
        found += below(self, 1, "sample_tokens")
        found += below(self, 0, "max_wait_sec", "sample_every")
        found += not_positive(self, "epochs")
        if self.total_steps is not None and self.epochs is not None:
            found.append(f"--total_steps {self.total_steps} and --epochs {self.epochs:g}: pass one of them")
        if self.fsdp and self.precision == "fp16":
            found.append("--fsdp with --precision fp16, whose loss scale is each process's own: pass bf16 or fp32")
        if not 0 <= (self.mixin_percent or 0) <= 1:
            found.append(f"--mixin_percent {self.mixin_percent}: a probability is needed, for two percent pass 0.02")
        elif self.mixin_percent and not self.data_dir:
            found.append(
                f"--mixin_percent {self.mixin_percent} without --data_dir: pass what build_data_splits.py wrote, or"
                " --mixin_percent 0"
            )
        return found


@dataclass(frozen=True)
class Plan:
    """What follows from the arguments, the data, the model and the number of processes."""

    mixed: MixedRows
    held_out_blocks: np.ndarray  # (n, seq_len + 1)
    held_out: HeldOut | None  # synthetic examples
    reach: float | None  # how to pack these (lm/packing.py)
    grad_accum: int
    effective_batch: int  # rows in a step
    packing: str  # the command that packs enough blocks
    schedule: Schedule
    prompt: list[int]  # ids that the texts of the model go on from


@dataclass
class Progress(lm.session.Progress):
    """Of this trainer: how far it has come in the data, and what it has measured since its last record."""

    pptrain_checkpoint: str | None = None  # what the run began with
    c4_block_idx: int = 0  # blocks drawn so far, those of stretches that were stepped over included
    mixin_idx: int = 0  # and synthetic examples
    pass_blocks: int | None = None  # blocks in a pass, once all have been drawn; a longer pack does not change it then
    tokens: int = 0  # targets trained on
    since: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURED, 0.0))


# What may change between a run and its continuation: nothing here enters the weights (the split of a batch does only as float
# order). Names and paths are free, what they stand for is not; so are the times of records, but not what they measure.
FREE = {"output_dir", "scratch_dir", "c4_dir", "data_dir", "pptrain_checkpoint", "model", "seq_len", "resume_from", "force_cpu"}
FREE |= {"deterministic", "detect_anomaly", "checkpoint_interval_steps", "max_step_checkpoints", "wandb_project"}
FREE |= {"wandb_run_name", "allow_epochs", "verify_data", "max_wait_sec", "micro_batch", "grad_accum", "effective_batch"}
FREE |= {"dirty", "profile", "fsdp", "cpu_offload", "grad_checkpoint", "ignore_estimate", "compile"}
FREE |= {"eval_every", "log_every", "ledger", "epochs", "sample_every", "sample_prompt", "sample_tokens", "test_documents"}


def identity(args: Args, plan: Plan, splits: Splits | None, model: PreTrainedModel, beginning: Beginning) -> dict[str, Any]:
    """What makes two runs the same run; a checkpoint only continues a run with the same."""
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    files = {name: about["sha256"] for name, about in splits.meta["files"].items()} if splits else {}
    settings |= {"effective_batch": plan.effective_batch, "data": files, "pack": plan.mixed.pack.identity}
    settings |= {"bf16_parameters": bool(args.fsdp) and args.precision == "bf16"}  # they travel, and add up, in bfloat16
    settings |= {"initial_weights": beginning.sha256, "architecture": architecture(model)}
    made_by = plan.mixed.pack.header  # by its own tokenizer (`read_pack`)
    return settings | {"tokenizer": made_by["tokenizer"]["fingerprint"], "eos_token_id": made_by["eos_token_id"]}


def train(args: Args, plan: Plan, session: Session, begun: float) -> int:
    """Train until the steps are made (returns 0) or a signal asks to stop (EXIT_STOPPED).

    Args: begun: when the process began, on the clock of `time.monotonic`, to say how long the first step took.
    """
    first: float | None = begun
    run, accelerator = session.run, session.accelerator
    weight, waited = plan.effective_batch * plan.mixed.pack.seq_len / accelerator.num_processes, 0.0
    ledger = Ledger(run, args.ledger, row_ids)
    while session.progress.step < args.total_steps:
        step, data_step = session.progress.step, session.progress.data_step
        if step == 0:
            look(args, plan, session)
        before = time.perf_counter()
        if not blocks_are_there(args, plan, session):
            return EXIT_STOPPED
        lr = args.lr * plan.schedule.factor(step)
        samples = rows_of_step(data_step, args.micro_batch, plan.grad_accum, accelerator)
        with part("data"):
            micro_batches = make_micro_batches(samples, plan, session.progress.pass_blocks, ledger, accelerator)
        waited += time.perf_counter() - before
        source = functools.partial(sources, samples, plan, session.progress.pass_blocks)
        step += 1
        logging = step % args.log_every == 0 or step == args.total_steps
        how = {"beta1": plan.schedule.beta1(step - 1), "look": logging or is_to_look(args, plan, session, step)}
        steps = session.make_step(micro_batches, weight, lr, args.max_grad_norm, source, **how)
        progress = session.progress  # another one if the run went back to a checkpoint
        progress.c4_block_idx, progress.mixin_idx = plan.mixed.drawn(progress.data_step * plan.effective_batch)
        if steps is None:
            ledger.forget()
            session.end_rollback()
            continue
        if first is not None:
            run.log.say(f"the first step was made {time.monotonic() - first:.1f} s after the start")
            first = None
        account(progress, steps, accelerator)
        for made in steps:
            ledger.write(made.step, made.data_step)
        if logging:
            result, when = steps[-1].result, steps[-1].time
            values = {"loss": result.loss, "lr": lr, **means(progress.since), "grad_norm": result.grad_norm}
            values |= {"c4_block_idx": progress.c4_block_idx, "mixin_idx": progress.mixin_idx}
            run.log.train(step, progress.tokens, when, **values, wait_sec=round(waited, 4))
            progress.since, waited = dict.fromkeys(MEASURED, 0.0), 0.0
        look(args, plan, session)
        if session.end_step(step == args.total_steps):
            return EXIT_STOPPED
    return 0


def blocks_are_there(args: Args, plan: Plan, session: Session) -> bool:
    """Wait, if need be, for the blocks of the next step; False if a signal asked to stop meanwhile.

    Raises: RuntimeError, once all is saved, if the pack ends before them and --allow_epochs was not given.
    """
    progress, pack = session.progress, plan.mixed.pack
    needed, _ = plan.mixed.drawn((progress.data_step + 1) * plan.effective_batch)
    if progress.pass_blocks is None and not wait_for_blocks(session, pack, needed, args.max_wait_sec, plan.packing):
        return False
    blocks = pack.num_blocks if progress.pass_blocks is None else progress.pass_blocks
    if needed > blocks:
        if not (args.allow_epochs and blocks):
            over = f" ({progress.data_offset} steps' rows were stepped over)" if progress.data_offset else ""
            too_short = f"{pack.folder} has {too_few(blocks, needed, plan.packing)}"
            session.give_up(RuntimeError(f"step {progress.step + 1} finds no text{over}: {too_short}"))
        progress.pass_blocks = blocks
    return True


def make_micro_batches(
    samples: list[range], plan: Plan, pass_blocks: int | None, ledger: Ledger, accelerator: Accelerator
) -> list[Batch]:
    """These samples as rows on the device; no loader processes, for a row costs microseconds, or a millisecond to tokenise."""
    make = plan.mixed.noted_rows if ledger.on else plan.mixed.rows
    made = ledger.note([make(rows, pass_blocks) for rows in samples])
    if accelerator.device.type == "cuda":
        made = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in made]
    with part("to_device"):
        return send_to_device(made, accelerator.device, non_blocking=True)


def sources(samples: list[range], plan: Plan, pass_blocks: int | None) -> list[list[tuple]]:
    """Where the rows of each micro-batch come from."""
    return [plan.mixed.sources(rows, pass_blocks) for rows in samples]


def account(progress: Progress, steps: Sequence[Made], accelerator: Accelerator) -> None:
    """Add what all processes measured in these steps, one after another: sums must not depend on how many are read at once."""
    if not steps:
        return
    measured = torch.stack([torch.stack(made.result.outcomes).sum(dim=0) for made in steps])
    for sums in accelerator.reduce(measured, "sum").tolist():
        for name, value in zip(MEASURED, sums, strict=True):
            progress.since[name] += value
        progress.tokens += round(sums[MEASURED.index("c4_targets")] + sums[MEASURED.index("synthetic_targets")])


def is_to_look(args: Args, plan: Plan, session: Session, step: int) -> bool:
    """Whether after this step the model is looked at, or its next step may have to wait for text."""
    after_next, pack = (session.progress.data_step + 2) * plan.effective_batch, plan.mixed.pack
    waits = session.progress.pass_blocks is None and plan.mixed.drawn(after_next)[0] > pack.num_blocks
    return waits or is_evaluating(args, step) or is_writing(args, step)


def is_evaluating(args: Args, step: int) -> bool:
    """Whether the model is evaluated after this step."""
    return step % args.eval_every == 0 or step == args.total_steps


def is_writing(args: Args, step: int) -> bool:
    """Whether the model writes a text after this step."""
    every = args.sample_every
    return is_evaluating(args, step) if every is None else bool(every) and (step % every == 0 or step == args.total_steps)


def look(args: Args, plan: Plan, session: Session) -> None:
    """Evaluate, and let the model write, if it is time to."""
    step, main = session.progress.step, session.run.log.main
    if is_evaluating(args, step):
        evaluate(args, plan, session)
    if is_writing(args, step) and (main or args.fsdp):  # of a divided model each process computes its part, all write the same
        with part("evaluate"):
            seed = draws.torch_seed(args.seed, step, 0)
            num_tokens = min(args.sample_tokens, plan.mixed.pack.seq_len - len(plan.prompt))
            text = write(session.bare, plan.mixed.tokenizer, plan.prompt, num_tokens, seed, args.precision)
        if main:
            session.run.log.sample(step, prompt=args.sample_prompt, text=text)


@part("evaluate")
def evaluate(args: Args, plan: Plan, session: Session) -> None:
    """Measure the loss on held-out text, and accuracy and loss on the held-out synthetic examples."""
    progress, accelerator = session.progress, session.accelerator
    text_loss = mean_loss(session.bare, plan.held_out_blocks, args.micro_batch, accelerator, args.precision)
    values = {"c4_loss": text_loss, "heldout_acc": None, "heldout_loss": None, "num_examples": 0}
    if plan.held_out is not None:
        measured = teacher_forced(session.bare, plan.held_out, accelerator, args.precision, plan.reach)
        values["heldout_acc"], values["heldout_loss"] = measured
        values["num_examples"] = plan.held_out.num_rows
    values |= {"tokens": progress.tokens, "c4_block_idx": progress.c4_block_idx, "mixin_idx": progress.mixin_idx}
    session.run.log.evaluation(progress.step, **values)


def about(progress: Progress) -> dict[str, Any]:
    """What the folder of a model says of it."""
    names = ("step", "tokens", "c4_block_idx", "mixin_idx")
    return {name: getattr(progress, name) for name in names}


def read_pack(args: Args, accelerator: Accelerator) -> tuple[Pack, PreTrainedTokenizerFast]:
    """The text, as far as it is packed, and its tokenizer. Raises: ValueError if they do not belong together."""
    pack = Pack(args.c4_dir, args.seq_len)
    look_again(pack, accelerator)
    if args.verify_data:
        pack.verify()
    tokenizer = load_tokenizer(pack.folder / "tokenizer")
    needed = pack.header["tokenizer"]["fingerprint"], pack.header["vocab_size"], pack.header["eos_token_id"]
    if (fingerprint(tokenizer), len(tokenizer), tokenizer.eos_token_id) != needed:
        raise ValueError(f"{pack.folder}/tokenizer did not make its shards: remove the folder and run build_pretrain.py again")
    return pack, tokenizer


def make_model(args: Args, beginning: Beginning, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> PreTrainedModel:
    """The model as it begins, or of the beginning's architecture if the run goes on."""
    torch.manual_seed(args.seed)
    if beginning.load_from is not None:
        return load_beginning(beginning.load_from, len(tokenizer), seq_len, args.dropout)
    return build_model(args.model, len(tokenizer), seq_len, special_ids(tokenizer), args.dropout)


def reckon(args: Args, name: str, vocab_size: int, seq_len: int, batch: tuple[int, int], accelerator: Accelerator) -> None:
    """Say what memory and time the run will take, unless that is hardly any. Raises: ValueError if it cannot fit."""
    model, tokens = on_paper(name, vocab_size, seq_len, args.dropout), args.total_steps * batch[1] * seq_len
    setup = setup_of(args, seq_len, accelerator.num_processes, accelerator.device, tokens, accumulates=batch[0] > 1)

    def say() -> None:
        found = estimate(model.config, setup)
        print("\n".join(found.lines()), flush=True)
        if (faults := found.faults()) and not args.ignore_estimate:
            raise ValueError(f"{'; '.join(faults)}; or begin anyway with --ignore_estimate")

    if operations(model, seq_len) * setup.tokens > WORTH_AN_ESTIMATE:
        main_decides(accelerator, say)


def make_plan(
    args: Args,
    pack: Pack,
    splits: Splits | None,
    building: Future[PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    batch: tuple[int, int],
    accelerator: Accelerator,
) -> Plan:
    """Choose what is held out, and see that text and examples suffice, while the model is built.

    Args:
        batch: (grad_accum, effective_batch).

    Raises: ValueError if they do not.
    """
    grad_accum, effective = batch
    synthetic = splits.rows("mixin") if args.mixin_percent else []
    mixed = MixedRows(pack, synthetic, tokenizer, args.seed, args.mixin_percent, args.mixin_loss, args.shuffle)
    held_out_blocks = pack.held_out_blocks()[: args.eval_blocks]
    if not len(held_out_blocks):
        raise ValueError(f"{pack.folder} has no whole block of held-out text: pack again with more of it")
    packing = f"python build_pretrain.py --scratch_dir {args.scratch_dir} --output_dir {args.c4_dir}"
    packing += f" --total_steps {args.total_steps} --effective_batch {effective}"
    if args.mixin_percent:
        check_tokenizer(tokenizer)
        mixed.check_synthetic(splits.folder / "mixin.jsonl", accelerator)
    check_supply(pack, mixed.drawn(args.total_steps * effective)[0], args.allow_epochs, packing)
    held_out = None
    if splits:
        held_out = encode_subset(splits.rows("eval"), args.eval_subset_size, args.seed, tokenizer, pack.seq_len)
        if not held_out.num_rows:
            raise ValueError(f"--seq_len {pack.seq_len} is too short for all held-out examples: pack longer blocks")
    schedule, prompt = args.lr_schedule(args.total_steps, effective * pack.seq_len), prompt_ids(tokenizer, args.sample_prompt)
    if len(prompt) >= pack.seq_len:
        raise ValueError(f"--sample_prompt has {len(prompt)} tokens, blocks {pack.seq_len}: pass a shorter one")
    model = building.result()
    reach = attention_reach(model) if splits and sees_only_itself(model) else None
    return Plan(mixed, held_out_blocks, held_out, reach, grad_accum, effective, packing, schedule, prompt)


def check_counts(plan: Plan, progress: Progress) -> None:
    """Raise RuntimeError unless the checkpoint has come as far in the data as (seed, step) say."""
    derived = plan.mixed.drawn(progress.data_step * plan.effective_batch)
    if derived != (stored := (progress.c4_block_idx, progress.mixin_idx)):
        raise RuntimeError(
            f"the checkpoint of step {progress.step} has drawn {stored} blocks and synthetic examples, seed and step give"
            f" {derived}: another version of this code wrote it; go on with that, or pass another --output_dir"
        )


def with_defaults(args: Args) -> Args:
    """The arguments with what follows from --scratch_dir and --data_dir where nothing is given."""
    scratch, of_graphs = Path(args.scratch_dir), bool(args.data_dir)
    begun = scratch / "pptrain"
    if not of_graphs and args.pptrain_checkpoint is None and (begun / "run.json").exists():
        raise ValueError(f"{begun} is there: say with --pptrain_checkpoint latest or none whether to begin with it")
    return replace(
        args,
        output_dir=args.output_dir or str(scratch / "pretrain"),
        c4_dir=args.c4_dir or str(scratch / "data/c4_packed"),
        pptrain_checkpoint=args.pptrain_checkpoint or ("latest" if of_graphs else "none"),
        mixin_percent=0.02 * of_graphs if args.mixin_percent is None else args.mixin_percent,
    )


def rows_asked_for(args: Args) -> int | None:
    """Rows of a step: as asked for, else those of the journal's preset, or 32; None if they follow from --grad_accum."""
    if args.effective_batch is not None or args.grad_accum is not None:
        return args.effective_batch
    preset = PRESETS.get(args.model)
    return preset.batch if isinstance(preset, GPT) and preset.batch and not args.data_dir else 32


def lay_out(args: Args, num_processes: int) -> tuple[int, int]:
    """Forward passes of each process and rows of a step."""
    return plan_batch(args.micro_batch, args.grad_accum, rows_asked_for(args), num_processes)


def with_steps(args: Args, pack: Pack, effective_batch: int) -> Args:
    """The arguments with the number of steps that --epochs stands for, rounded down."""
    if args.shuffle and not pack.finished:
        raise ValueError(f"{pack.folder} is not finished, which --shuffle needs: wait for build_pretrain.py, or leave it out")
    if args.total_steps is not None:
        return args
    epochs = 1.0 if args.epochs is None else args.epochs
    if not pack.finished or args.mixin_percent == 1:
        what = "is not finished" if not pack.finished else "is not read with --mixin_percent 1"
        raise ValueError(f"{pack.folder} {what}, so that its passes cannot be counted: pass --total_steps")
    blocks, drawn = math.floor(round(epochs * pack.num_blocks, 6)), Mixture(args.seed, args.mixin_percent).drawn
    most = range(2 * math.ceil(blocks / effective_batch / (1 - args.mixin_percent)) + 2)
    steps = bisect.bisect_right(most, blocks, key=lambda steps: drawn(steps * effective_batch)[0]) - 1
    if steps < 1:
        raise ValueError(
            f"{epochs:g} passes over the {pack.num_blocks} blocks of {pack.folder} are not one step of {effective_batch}: pass"
            " a lower --effective_batch, more --epochs, or pack more"
        )
    return replace(args, total_steps=steps, allow_epochs=args.allow_epochs or epochs > 1)


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, before anything of it is written."""

    args: Args
    accelerator: Accelerator
    splits: Splits | None
    beginning: Beginning
    tokenizer: PreTrainedTokenizerFast
    plan: Plan
    model: PreTrainedModel


def prepare(args: Args) -> Prepared:
    """Open the data and build or load the model. Raises: ValueError or FileNotFoundError for whatever does not fit."""
    check(args.faults())
    args = fall_back(args)
    args = with_defaults(args)
    accelerator = start_accelerator(args.precision, args.force_cpu, args.cpu_offload)
    pack, tokenizer = read_pack(args, accelerator)
    splits = open_splits(args.data_dir) if args.data_dir else None
    test_files(args)  # no file should be missed now and not after the last step
    beginning = choose_beginning(args, tokenizer, pack.folder, accelerator)
    of_model = str(beginning.load_from or args.model), len(tokenizer), pack.seq_len
    args = with_micro_batch(args, rows_asked_for(args), *of_model, accelerator)
    batch = lay_out(args, accelerator.num_processes)
    args = with_steps(args, pack, batch[1])
    reckon(args, *of_model, batch, accelerator)
    building = beside(lambda: make_model(args, beginning, tokenizer, pack.seq_len))
    plan = make_plan(args, pack, splits, building, tokenizer, batch, accelerator)
    model = building.result()
    lay_out_memory(args, model, accelerator, args.precision)
    return Prepared(args, accelerator, splits, beginning, tokenizer, plan, model)


def test_files(args: Args) -> list[File]:
    """The files of --test_documents. Raises: FileNotFoundError or ValueError if there are none, or of an unknown kind."""
    return find_files(args.test_documents) if args.test_documents else []


def measure_results(args: Args, plan: Plan, session: Session) -> dict[str, Any]:
    """Loss and perplexity on text trained on and held out."""
    progress, accelerator, mixed = session.progress, session.accelerator, plan.mixed
    numbers = [mixed.block(n, progress.pass_blocks) for n in range(min(args.eval_blocks, progress.c4_block_idx))]
    blocks = {"train": mixed.pack.blocks(numbers), "validation": plan.held_out_blocks}
    found = {}
    for split, of in blocks.items():
        if len(of):
            found[split] = loss_and_perplexity(mean_loss(session.bare, of, args.micro_batch, accelerator, args.precision))
    return found


def test_loss(args: Args, plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    """The same of the test files, with what they are."""
    files, mixed = test_files(args), plan.mixed
    found = text_loss(model, mixed.tokenizer, files, mixed.pack.seq_len, args.micro_batch, args.precision)
    return found | {"documents": digest(files)}


def main(args: Args) -> int:
    """Train one run and return its exit code."""
    begun, results = time.monotonic(), {}
    ready = prepare(args)
    args, splits, beginning, plan, model = ready.args, ready.splits, ready.beginning, ready.plan, ready.model
    accelerator, tokenizer, pack = ready.accelerator, ready.tokenizer, plan.mixed.pack

    blocks, examples = plan.mixed.drawn(args.total_steps * plan.effective_batch)
    derived = {
        "effective_batch": plan.effective_batch,
        "micro_batch": args.micro_batch,
        "grad_accum": plan.grad_accum,
        "seq_len": pack.seq_len,
        "total_steps": args.total_steps,
        "tokens_per_step": plan.effective_batch * pack.seq_len,
        "pptrain_checkpoint": beginning.path,
        "initial_weights": beginning.sha256,
        "pack": pack.identity,
        "c4_blocks_needed": blocks,
        "c4_blocks_packed": pack.num_blocks,
        "mixin_examples": examples,
        "mixin_rows": len(plan.mixed.synthetic),
        "held_out_blocks": len(plan.held_out_blocks),
        "held_out_examples": plan.held_out.num_rows if plan.held_out else 0,
        "held_out_too_long": plan.held_out.num_too_long if plan.held_out else 0,
        "positions": getattr(model.config, "max_position_embeddings", None),
        "vocab_size": len(tokenizer),
        "num_parameters": num_parameters(model),
        "non_embedding_parameters": non_embedding_parameters(model),
    }
    with open_run(args, derived, accelerator) as run:
        run.log.say("  ".join(f"{key} {value}" for key, value in derived.items()))
        if beginning.path is not None:
            run.log.say(f"the architecture is that of {beginning.path}, --model counts for random weights only")
        sample, pass_blocks = text_rows(plan.held_out_blocks[:1]), pack.num_blocks if args.shuffle else None
        start = Progress(pptrain_checkpoint=beginning.path, pass_blocks=pass_blocks)
        same_run = identity(args, plan, splits, model, beginning)
        session = Session(args, run, model, optimizer_of(args, model), mixed_loss, sample, start, same_run)
        session.resume()
        check_counts(plan, session.progress)
        code = train(args, plan, session, begun)
        if code == 0:
            documents = digest(test_files(args)) if args.test_documents else None
            without = main_decides(accelerator, lambda: not has_results(run.folder, documents))
            if session.finish(tokenizer, about(session.progress)) or without:
                results = about(session.progress) | measure_results(args, plan, session)
        run.close()
    if results and (accelerator.is_main_process or args.fsdp):  # the others need not wait, which NCCL allows for ten minutes
        if args.test_documents:
            results["test"] = test_loss(args, plan, model)
        if accelerator.is_main_process:
            write_results(run, results, begun)
    return code


if __name__ == "__main__":
    run_and_exit(main, parse(Args))
