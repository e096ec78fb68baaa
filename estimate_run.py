"""What memory and time a run of pretrain.py would take, before there is any data.

    python estimate_run.py --model psann-3b --vocab_size 50304 --seq_len 2048 --micro_batch 4 --tokens 60_000_000_000 \
        --num_processes 8 --fsdp full_shard --grad_checkpoint --device_gib 80 --tflops 700

Without --device_gib and --tflops it is for the device of this machine, whose speed is tried. pretrain.py says the same when it
begins; here nothing is needed but the model's name.

Exits   0 if it fits, else 1
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from lm.args import below, check, not_positive, parse
from lm.estimate import Setup, estimate
from lm.models import num_parameters, on_paper
from lm.optim import OptimizerName


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str
    """A preset of lm/presets.py, a folder with config.json, or a hub name."""
    vocab_size: int = 50304
    """Ids of the tokenizer."""
    seq_len: int = 2048
    """Targets in a row."""
    micro_batch: int = 4
    """Rows in one forward pass of one process."""
    tokens: int
    """Targets of the whole run."""
    num_processes: int = max(1, torch.cuda.device_count())
    """Processes, one on each device."""
    processes_per_node: int = 8
    """Of them on one machine at most, which share its memory."""
    optimizer: OptimizerName = "adamw"
    """As for pretrain.py."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the forward and backward pass."""
    fsdp: Literal["full_shard"] | None = None
    """As for pretrain.py."""
    cpu_offload: bool = False
    """As for pretrain.py."""
    grad_checkpoint: bool = False
    """As for pretrain.py."""
    device_gib: float | None = None
    """Memory of a GPU; by default it is for the device of this machine."""
    host_gib: float | None = None
    """Memory of a machine; by default what is free on this one, or, with --device_gib, as much as is needed."""
    tflops: float | None = None
    """Speed of a device in a product of large matrices, in 10^12 operations a second; by default it is tried here."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = below(self, 1, "vocab_size", "seq_len", "micro_batch", "tokens", "num_processes", "processes_per_node")
        if (self.device_gib is None) != (self.tflops is None):
            found.append(f"--device_gib {self.device_gib} and --tflops {self.tflops}: of another machine's device pass both")
        return found + not_positive(self, "device_gib", "tflops", "host_gib")


def main(args: Args) -> int:
    """Print the estimate; 1 if it cannot fit."""
    check(args.faults())
    model = on_paper(args.model, args.vocab_size, args.seq_len)
    setup = Setup(
        optimizer=args.optimizer,
        precision=args.precision,
        fsdp=bool(args.fsdp),
        cpu_offload=args.cpu_offload,
        grad_checkpoint=args.grad_checkpoint,
        micro_batch=args.micro_batch,
        seq_len=args.seq_len,
        tokens=args.tokens,
        num_processes=args.num_processes,
        local_processes=min(args.num_processes, args.processes_per_node),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        device_bytes=args.device_gib and args.device_gib * 2**30,
        operations_per_sec=args.tflops and args.tflops * 1e12,
        host_bytes=args.host_gib and args.host_gib * 2**30,
    )
    found = estimate(model.config, setup)
    print("\n".join([f"{args.model}: {num_parameters(model):,} parameters", *found.lines()]))
    print("\n".join(found.faults()) or "it fits")
    return 1 if found.faults() else 0


if __name__ == "__main__":
    sys.exit(main(parse(Args)))
