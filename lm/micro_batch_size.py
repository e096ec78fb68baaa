"""The largest micro-batch that fits into memory: --micro_batch auto.

The rows of a step are the same whatever the micro-batch, and its gradient differs in the last bits alone. Candidates are what
divides the rows that a process has in a step. The estimate (lm/estimate.py) says which fit, with room for what it does not see;
on a GPU one pass of that size is made before the run begins, and if memory is not enough after all, of the next smaller one. A
model that is divided (--fsdp) is not tried: where one process fails, the others would wait for it.
"""

import bisect
import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from lm.activations import make_model, make_pass
from lm.estimate import Memory, gib, listed
from lm.files import read_json
from lm.models import on_paper
from lm.precision import DTYPES
from lm.run import main_decides, set_numerics
from lm.trainer_args import TrainerArgs, setup_of

# Of the free memory may be used, by the estimate. On a CPU glibc keeps much of what is freed: benchmarks/memory.py saw 1.05 to
# 2.6 times as much resident memory as the estimate, the more the smaller the model.
ROOM = {"cpu": 0.6, "tried": 0.95, "divided": 0.8}
T = TypeVar("T", bound=TrainerArgs)


def with_micro_batch(
    args: T, effective_batch: int, name: str, vocab_size: int, seq_len: int, accelerator: Accelerator, packed: bool = False
) -> T:
    """The arguments with a number of rows for --micro_batch auto, the same on every process; others as they are.

    A run that goes on with as many processes as it began with keeps its number.

    Args:
        name: of the model, as `lm.models.build_model` knows it.
        seq_len: targets in a row, or in the longest.
        packed: whether several examples may share a row; it is reckoned with as many rows as examples, all as long as possible.
    Raises: ValueError if not one row fits, or if the processes cannot share the rows of a step.
    """
    if args.micro_batch != "auto":
        return args
    processes = accelerator.num_processes
    rows, rest = divmod(effective_batch, processes)
    if rest:
        raise ValueError(
            f"--effective_batch {effective_batch} is not a multiple of the {processes} processes: change one of the two"
        )
    number = main_decides(accelerator, lambda: kept(Path(args.output_dir), processes, rows))
    said = "as this run had it before"
    if number is None:
        setup = setup_of(args, seq_len, processes, accelerator.device, packed=packed)
        memory = Memory(on_paper(name, vocab_size, seq_len, args.dropout).config, setup)
        number, said = find(args, memory, rows, accelerator)
    if accelerator.is_main_process:
        passes = rows // number
        print(f"--micro_batch auto: {number} rows in a pass of a process, passes in a step: {passes}; {said}", flush=True)
    return replace(args, micro_batch=number)


def kept(folder: Path, num_processes: int, rows: int) -> int | None:
    """The number that a run in this folder which goes on had on as many processes, if it divides `rows`."""
    if not (folder / "run.json").exists() or not any((folder / "checkpoints").glob("step_*")):
        return None
    about = read_json(folder / "run.json", "the training script")
    number = about.get("derived", {}).get("micro_batch")
    same = about.get("num_processes") == num_processes and type(number) is int and number > 0 and rows % number == 0
    return number if same else None


def find(args: TrainerArgs, memory: Memory, rows: int, accelerator: Accelerator) -> tuple[int, str]:
    """The largest size that fits, and why. Raises: ValueError if none does, or if the estimate cannot tell."""
    setup, sizes = memory.setup, [size for size in range(1, rows + 1) if rows % size == 0]
    how = "cpu" if not setup.is_gpu else "divided" if setup.fsdp else "tried"
    trying, room = how == "tried", ROOM[how]
    there = memory.needs(0.0).device_bytes  # once: it changes from moment to moment

    @functools.cache
    def parts(size: int) -> dict[str, float]:
        try:
            return memory.needs(memory.activations(size, accumulates=size < rows)).device
        except Exception as error:  # of whatever kind a model's code raises on tensors without numbers
            raise ValueError(
                f"--micro_batch auto: the memory of --model {args.model} cannot be reckoned ({error!r:.200}): pass a number"
            ) from error

    def least(number: int) -> int:
        return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).min())

    runs = (lambda size: has_memory(args, memory, size, size < rows)) if trying else (lambda size: True)
    number = choose(sizes, lambda size: sum(parts(size).values()) <= room * there, runs, least)
    needs = parts(number or 1)
    about = f"about {gib(sum(needs.values()))} ({listed(needs)}) of {gib(there)} that are free for a process"
    if not number:
        help_ = "a smaller model" if not setup.is_gpu else "--grad_checkpoint, --fsdp full_shard where the trainer has it"
        raise ValueError(
            f"--micro_batch auto: not one row of {setup.seq_len} targets fits into memory, it would take {about}, of which"
            f" {room:.0%} may be used: try {help_}, a shorter row, or --micro_batch 1 all the same"
        )
    return number, about


def choose(sizes: Sequence[int], fits: Callable[[int], bool], runs: Callable[[int], bool], least: Callable[[int], int]) -> int:
    """The largest of the sizes that fits and runs on every process; 0 if there is none.

    Args:
        sizes: rising. Of two but the largest that fit or do not, the smaller one needs less; the largest is a whole step, which
            needs no gradients of other passes beside it.
        least: the minimum of a number over all processes.
    """
    whole = len(sizes) if fits(sizes[-1]) else 0
    place = least(whole or bisect.bisect_left(sizes[:-1], True, key=lambda size: not fits(size)))
    while place and not least(fits(sizes[place - 1]) and runs(sizes[place - 1])):
        place -= 1
    return sizes[place - 1] if place else 0


def has_memory(args: TrainerArgs, memory: Memory, micro_batch: int, accumulates: bool) -> bool:
    """Whether a real pass of this size finds memory on the device, beside all that stays there from step to step."""
    found, cuda = True, memory.setup.device.type == "cuda"
    with torch.random.fork_rng([memory.setup.device] if cuda else []):
        set_numerics(args)  # deterministic kernels need more memory
        try:
            _pass(memory, micro_batch, accumulates)
        except torch.OutOfMemoryError:
            found = False
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def _pass(memory: Memory, micro_batch: int, accumulates: bool) -> None:
    setup, state = memory.setup, memory.state()
    model = make_model(memory.config, setup.device, torch.float32, DTYPES[setup.precision], setup.grad_checkpoint)
    beside = sum(state.values()) - state["weights"] - sum(parameter.nbytes for parameter in model.parameters())
    held = torch.empty(int(beside), dtype=torch.uint8, device=setup.device)
    ids = torch.zeros(micro_batch, setup.seq_len + 1, dtype=torch.int64, device=setup.device)
    for _ in range(2 if accumulates else 1):
        make_pass(model, ids, setup.packed)
    del held
