"""How much memory does a training step take, as estimated, as it is, and with whole logits?

    python -m benchmarks.memory
    python -m benchmarks.memory --models pythia-160m --micro_batches 8 32 --seq_len 2048 --precisions bf16     # on a GPU

Each figure is of a process of its own, which builds the model and makes some updates with AdamW, of one micro-batch each. Ours
computes the loss in chunks (lm/loss.py, lm/step.py); the peer is the plain loop: model(input_ids).logits, F.cross_entropy of
their float32 copy, backward, the same optimizer. On a GPU it is torch.cuda.max_memory_allocated. On a CPU it is the highest
resident memory that the kernel saw of the process (VmHWM) less what it had before the model, when one small update of another
model had loaded the libraries. glibc keeps blocks that were freed, and so resident memory may be much more than what is in use:
for "ours" and "plain" it is told to give back all of more than 64 KiB at once (MALLOC_MMAP_THRESHOLD_), which costs time;
"kept" is ours as glibc does by default, and as any run has it. "estimate" is lm/estimate.py's for weights, gradients, moments
and the tensors of a pass. The ratios are to ours. Everything is appended to benchmarks/results.jsonl.
"""

import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lm.args import parse
from lm.estimate import Memory, Setup
from lm.loss import next_token_loss
from lm.models import build_model, on_paper
from lm.optim import make_optimizer
from lm.precision import DTYPES
from lm.run import start_accelerator
from lm.step import train_step

KINDS = ("ours", "plain")
UPDATES = 3


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is measured."""

    models: tuple[str, ...] = ("pythia-14m", "pythia-70m", "olmo-4m")
    """Presets of lm/presets.py."""
    micro_batches: tuple[int, ...] = (2, 8)
    """Rows in a step."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """fp32 or bf16."""
    seq_len: int = 512
    """Targets in a row."""
    vocab_size: int = 50_304
    """Ids."""
    most_gib: float = 12.0
    """Cells that the peer would need more for, by a rough guess, are left out."""
    kind: Literal["", "ours", "plain"] = ""
    """Of a child process: what it measures."""


def ours(model: PreTrainedModel, precision: str, rows: torch.Tensor) -> Callable[[], None]:
    """An update as every trainer makes it."""
    accelerator = start_accelerator(precision, force_cpu=not rows.is_cuda)
    model, optimizer = accelerator.prepare(model, make_optimizer("adamw", model, 1e-4, (0.9, 0.95), 1e-8, 0.1))
    weight = rows[:, 1:].numel()
    return lambda: train_step(accelerator, model, optimizer, [rows], next_token_loss, weight, 1e-4, 1.0)


def plain(model: PreTrainedModel, precision: str, rows: torch.Tensor) -> Callable[[], None]:
    """An update as one would write it down."""
    optimizer = make_optimizer("adamw", model, 1e-4, (0.9, 0.95), 1e-8, 0.1)

    def update() -> None:
        with torch.autocast(rows.device.type, DTYPES[precision], enabled=precision != "fp32"):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def child(args: Args) -> None:
    """Print the bytes of one cell."""
    (name,), (micro_batch,), (precision,) = args.models, args.micro_batches, args.precisions
    make, device = {"ours": ours, "plain": plain}[args.kind], "cuda" if torch.cuda.is_available() else "cpu"
    small = torch.zeros(1, 9, dtype=torch.int64, device=device)
    make(build_model("neox-64x2", 300, 8).to(device), precision, small)()
    gc.collect()
    before = _resident("VmRSS")
    model = build_model(name, args.vocab_size, args.seq_len).to(device).train()
    update = make(model, precision, torch.randint(args.vocab_size, (micro_batch, args.seq_len + 1), device=device))
    for _ in range(UPDATES):
        update()
    print(torch.cuda.max_memory_allocated() if device == "cuda" else _resident("VmHWM") - before)


def _resident(what: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at its highest (VmHWM)."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measured(kind: str, name: str, precision: str, micro_batch: int, args: Args, gives_back: bool = True) -> int:
    """Bytes, in a process of its own, of which glibc gives back what is freed, or not."""
    cell = ["--kind", kind, "--models", name, "--precisions", precision, "--micro_batches", str(micro_batch)]
    shape = ["--seq_len", str(args.seq_len), "--vocab_size", str(args.vocab_size)]
    environment = dict(os.environ)
    if gives_back:
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-m", "benchmarks.memory", *cell, *shape]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def estimated(name: str, precision: str, micro_batch: int, args: Args) -> float:
    """Bytes of weights, gradients, moments and the tensors of a pass."""
    setup = Setup(
        optimizer="adamw",
        precision=precision,
        fsdp=False,
        cpu_offload=False,
        grad_checkpoint=False,
        micro_batch=micro_batch,
        seq_len=args.seq_len,
        tokens=0,
        num_processes=1,
        local_processes=1,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    memory = Memory(on_paper(name, args.vocab_size, args.seq_len).config, setup)
    return sum(memory.state().values()) + memory.activations(micro_batch, accumulates=False)


def compare(name: str, precision: str, micro_batch: int, args: Args) -> dict:
    """One cell."""
    found = {kind: measured(kind, name, precision, micro_batch, args) for kind in KINDS}
    found["estimate"] = estimated(name, precision, micro_batch, args)
    if not torch.cuda.is_available():
        found["kept"] = measured("ours", name, precision, micro_batch, args, gives_back=False)
    return {
        "benchmark": "memory",
        "model": name,
        "precision": precision,
        "micro_batch": micro_batch,
        "seq_len": args.seq_len,
        "vocab_size": args.vocab_size,
        "mb": {kind: round(size / 1e6) for kind, size in found.items()},
        "ratio": {kind: round(size / found["ours"], 3) for kind, size in found.items() if kind != "ours"},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def main(args: Args) -> None:
    """Print a row for each cell."""
    print("model        precision  micro_batch  ours (MB)  estimate (MB)  ratio  plain (MB)  ratio  kept (MB)  ratio")
    for name, precision, micro_batch in itertools.product(args.models, args.precisions, args.micro_batches):
        beginning = f"{name:<12} {precision:<9}  {micro_batch:>11}  "
        if 20 * micro_batch * args.seq_len * args.vocab_size > args.most_gib * 2**30:  # five tensors as large as the logits
            print(f"{beginning}left out: the peer would need more than --most_gib {args.most_gib:g}")
            continue
        row = compare(name, precision, micro_batch, args)
        cells = [f"{row['mb']['ours']:>9,}"]
        for kind, width in (("estimate", 13), ("plain", 10), ("kept", 9)):
            cells += [f"{row['mb'].get(kind, '-'):>{width}}", f"{row['ratio'].get(kind, '-'):>5}"]
        print(beginning + "  ".join(cells), flush=True)
        with open(Path(__file__).parent / "results.jsonl", "a") as file:
            file.write(json.dumps(row | {"torch": torch.__version__, "timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    given = parse(Args)
    child(given) if given.kind else main(given)
