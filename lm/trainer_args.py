"""The arguments that decide an update, the same for every trainer; each trainer has defaults of its own."""

import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from lm.args import RunArgs, below, not_positive, outside_0_to_1
from lm.estimate import Setup
from lm.fsdp import blocks, shard
from lm.optim import Decay, OptimizerName, make_optimizer
from lm.precision import DTYPES
from lm.schedule import Schedule, ScheduleName

ONE_CYCLE = ("pct_start", "div_factor", "final_div_factor", "three_phase", "cycle_momentum")
SCHEDULE = ("schedule", "warmup_steps", "min_lr_ratio", *ONE_CYCLE, "decay_share", "warmup_tokens", "decay_tokens")
MicroBatch = int | Literal["auto"]
T = TypeVar("T", bound="TrainerArgs")


@dataclass(frozen=True, kw_only=True)
class TrainerArgs(RunArgs):
    """What every trainer takes beside where the run lies and how it is looked after."""

    model: str
    """Architecture, with random weights: a preset of lm/presets.py, a folder with config.json, or a hub name."""
    dropout: float | None = None
    """Probability of every dropout of the model; by default that of the preset or configuration."""
    micro_batch: MicroBatch
    """Rows (windows, examples) in one forward pass of one process. auto: as many as fit into the memory that is free when the
    run begins (lm/micro_batch_size.py)."""
    grad_accum: int | None = None
    """Forward passes in one optimizer step; follows from --effective_batch by default."""
    effective_batch: int | None = None
    """Rows in one optimizer step over all processes."""

    optimizer: OptimizerName = "adamw"
    """adamw; adamw8bit: its moments in 8 bits; adafactor: second moments of rows and columns alone; muon: orthogonalised
    momentum for the matrices of the body, AdamW for all else; sgd: with momentum --adam_beta1."""
    lr: float
    """Peak learning rate."""
    schedule: ScheduleName
    """What the learning rate does after its warm-up: constant; cosine or linear to the end; one_cycle: up and down, with a
    warm-up of its own; wsd: constant, then down in the last steps; gpt3: cosine over a number of tokens."""
    warmup_steps: int
    """Optimizer steps of linear warm-up (one_cycle and gpt3 have their own)."""
    min_lr_ratio: float
    """Last learning rate over the peak, for cosine, linear, wsd and gpt3."""
    pct_start: float = Schedule.pct_start
    """one_cycle: share of the steps in which the learning rate rises."""
    div_factor: float = Schedule.div_factor
    """one_cycle: peak over first learning rate."""
    final_div_factor: float = Schedule.final_div_factor
    """one_cycle: first over last learning rate."""
    three_phase: bool = Schedule.three_phase
    """one_cycle: as long down to the first learning rate as up, and from there to the last."""
    cycle_momentum: bool = Schedule.cycle_momentum
    """one_cycle: the first beta, or momentum, goes from .95 to .85 and back while the learning rate rises and falls."""
    decay_share: float = Schedule.decay_share
    """wsd: share of the steps in which the learning rate falls."""
    warmup_tokens: int = Schedule.warmup_tokens
    """gpt3: tokens of linear warm-up."""
    decay_tokens: int = Schedule.decay_tokens
    """gpt3: tokens until the learning rate is at its last value."""
    weight_decay: float
    """Of the weights, decoupled from the gradient (of sgd, a part of it)."""
    decay: Decay = "matrices"
    """What decays: matrices and embeddings, or all, norms and biases too, as in OLMo."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float
    """Decay of the second moment."""
    adam_eps: float = 1e-6
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """L2 norm to which a longer gradient is scaled down; 0 turns that off."""
    compile: bool = False
    """Compile the model's blocks (torch.compile): some ten seconds or more before the first step, less later on; what was
    compiled is kept in compile_cache beside the run's folder. For long runs on GPUs; on CPUs it hardly pays."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults()
        found += below(self, 1, "grad_accum", "effective_batch", "decay_tokens", "div_factor", "final_div_factor")
        if self.micro_batch != "auto":
            found += below(self, 1, "micro_batch")
        elif self.grad_accum is not None:
            found.append(f"--grad_accum {self.grad_accum} with --micro_batch auto, from which it follows: leave it out")
        found += below(self, 0, "warmup_steps", "warmup_tokens", "weight_decay", "max_grad_norm")
        found += not_positive(self, "lr", "adam_eps")
        found += outside_0_to_1(self, "adam_beta1", "adam_beta2", "min_lr_ratio", "pct_start", "decay_share")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            found.append(f"--dropout {self.dropout}: a probability from 0 to less than 1 is needed")
        if self.cycle_momentum and self.schedule != "one_cycle":
            found.append(f"--cycle_momentum with --schedule {self.schedule}: it belongs to one_cycle")
        if self.three_phase and self.pct_start > 0.5:
            found.append(f"--pct_start {self.pct_start} with --three_phase, which falls for as long: at most .5 is possible")
        if self.cycle_momentum and self.optimizer == "adafactor":
            found.append("--cycle_momentum with --optimizer adafactor, which has no momentum: leave it out")
        return found

    def lr_schedule(self, total_steps: int, tokens_per_step: int) -> Schedule:
        """The schedule that these arguments name."""
        options = {name: getattr(self, name) for name in SCHEDULE[1:]}
        return Schedule(name=self.schedule, total_steps=total_steps, tokens_per_step=tokens_per_step, **options)


@dataclass(frozen=True, kw_only=True)
class LargeModelArgs(TrainerArgs):
    """What trains a model that would not fit otherwise."""

    fsdp: Literal["full_shard"] | None = None
    """full_shard: divide weights, gradients and moments among the processes (FSDP2); by default each has all of them."""
    cpu_offload: bool = False
    """With --fsdp: keep them in CPU memory, where the optimizer computes too."""
    grad_checkpoint: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults()
        if self.cpu_offload and not self.fsdp:
            found.append("--cpu_offload without --fsdp: pass --fsdp full_shard too")
        return found


def compile_blocks(args: TrainerArgs, model: PreTrainedModel) -> None:
    """Have each block compiled when it is first used, if the arguments say so: all alike, so that one is compiled for all."""
    if args.compile:
        cache = Path(args.output_dir).absolute().parent / "compile_cache"
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
        for block in blocks(model):
            block.compile()


def setup_of(args: TrainerArgs, seq_len: int, num_processes: int, device: torch.device, tokens: int = 0, **known: Any) -> Setup:
    """What memory and time depend on, for these arguments with --micro_batch as a number (or not used); `known`: more of it."""
    large = {name: getattr(args, name, False) for name in ("cpu_offload", "grad_checkpoint")}
    return Setup(
        optimizer=args.optimizer,
        precision=args.precision,
        fsdp=bool(getattr(args, "fsdp", None)),
        **large,
        micro_batch=1 if args.micro_batch == "auto" else args.micro_batch,
        seq_len=seq_len,
        tokens=tokens,
        num_processes=num_processes,
        local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        device=device,
        **known,
    )


def lay_out_memory(args: LargeModelArgs, model: PreTrainedModel, accelerator: Accelerator, precision: str) -> None:
    """Do to the model what these arguments say, before its optimizer is made."""
    if args.grad_checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compile_blocks(args, model)
    if args.fsdp:
        shard(model, accelerator, DTYPES[precision], args.cpu_offload)


def optimizer_of(args: TrainerArgs, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that these arguments name."""
    betas = (args.adam_beta1, args.adam_beta2)
    return make_optimizer(args.optimizer, model, args.lr, betas, args.adam_eps, args.weight_decay, args.decay)


def fall_back(args: T) -> T:
    """The arguments with adamw where the library of the optimizer they name is missing, which is said."""
    if args.optimizer != "adamw8bit" or importlib.util.find_spec("bitsandbytes") is not None:
        return args
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            "warning: no bitsandbytes, --optimizer adamw8bit needs it: falling back to adamw, with 8 bytes of moments for each"
            " parameter instead of 2; pip install bitsandbytes for the other",
            flush=True,
        )
    return replace(args, optimizer="adamw")
