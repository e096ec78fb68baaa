"""What a training run will need, before it begins: memory of each process by part, and time.

Parameters, gradients and moments are counted exactly, and so are the tensors of one forward and backward pass
(lm/activations.py). The time is that of the operations the model needs, at a share of the speed at which this machine
multiplies matrices as large as the model's.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lm.activations import OnPaper
from lm.fsdp import blocks
from lm.optim import OptimizerName, needed_moments, parameter_groups
from lm.precision import DTYPES

SHARE_OF_SPEED = {"cuda": 0.4, "cpu": 0.5}  # of that of a large matrix product: what well fed training reaches, about
LIBRARIES = {"cuda": 1.0 * 2**30, "cpu": 0.5 * 2**30}  # what a process has before there is any model
SPARE = 0.95  # of the memory: the rest is lost between allocations


@dataclass(frozen=True)
class Setup:
    """What memory and time depend on beside the model."""

    optimizer: OptimizerName
    precision: str
    fsdp: bool
    cpu_offload: bool
    grad_checkpoint: bool
    micro_batch: int
    seq_len: int
    tokens: int  # of the whole run
    num_processes: int
    local_processes: int  # that share this machine's CPU memory
    device: torch.device
    device_bytes: float | None = None  # of memory on a GPU that is not this machine's
    host_bytes: float | None = None  # of memory in a machine that is not this one
    operations_per_sec: float | None = None  # that a device makes in a product of large matrices; by default it is tried here
    accumulates: bool = True  # whether a step has several micro-batches, and so gradients of others in a forward pass
    packed: bool = False  # whether rows hold several documents, and need a mask

    @property
    def is_gpu(self) -> bool:
        """Whether devices have memory of their own."""
        return self.device.type == "cuda" or self.device_bytes is not None


@dataclass(frozen=True)
class Needs:
    """Bytes by part for one process, on its device and in the machine's memory, and what there is of both."""

    device: dict[str, float]
    host: dict[str, float]
    device_bytes: float
    host_bytes: float

    def faults(self) -> list[str]:
        """What does not fit, with what would help."""
        found = []
        places = (
            ("this device", self.device, self.device_bytes),
            ("a process's part of the memory", self.host, self.host_bytes),
        )
        for what, parts, there in places:
            if (needed := sum(parts.values())) > SPARE * there:
                largest = max(parts, key=parts.__getitem__)
                found.append(
                    f"a process needs about {gib(needed)} of {what} ({listed(parts)}), {gib(there)} are there for it: try"
                    f" {REMEDIES[largest]}"
                )
        return found


@dataclass(frozen=True)
class Estimate(Needs):
    """The same, and seconds."""

    seconds: float

    def lines(self) -> list[str]:
        """For people, before the run."""
        on_device = f"{gib(sum(self.device.values()))} of {gib(self.device_bytes)}"
        said = [f"estimate for each process: {on_device} on its device ({listed(self.device)})"]
        if self.host:
            said.append(f"  and {gib(sum(self.host.values()))} of {gib(self.host_bytes)} in memory ({listed(self.host)})")
        return [*said, f"  and about {_duration(self.seconds)}, without evaluations and checkpoints"]


_STATE = "more processes with --fsdp full_shard, --optimizer adamw8bit or adafactor, or a smaller model"
REMEDIES = {
    "weights": _STATE,
    "gradients": _STATE,
    "moments": _STATE,
    "gathered": "a model with narrower blocks",
    "activations": "--grad_checkpoint, a lower --micro_batch, or a shorter --seq_len",
    "libraries": "fewer processes",
    "building": "fewer processes on this machine",
    "checkpoints": "more processes with --fsdp full_shard",
}


def estimate(config: PreTrainedConfig, setup: Setup) -> Estimate:
    """What training a model of this configuration needs."""
    memory = Memory(config, setup)
    try:
        activations = memory.activations(setup.micro_batch, setup.accumulates)
    except Exception as error:  # of whatever kind a model's code raises on tensors without numbers
        print(f"warning: activations are not estimated ({error!r:.200})", flush=True)
        activations = 0.0
    return Estimate(**vars(memory.needs(activations)), seconds=_seconds(memory.model, setup))


class Memory:
    """What training takes of it, for whatever micro-batch."""

    def __init__(self, config: PreTrainedConfig, setup: Setup):
        self.config, self.setup = config, setup
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)

    @functools.cached_property
    def _on_paper(self) -> OnPaper:
        setup, compute = self.setup, DTYPES[self.setup.precision]
        weights = compute if setup.fsdp else torch.float32  # in which they arrive
        return OnPaper(self.config, setup.device, weights, compute, setup.grad_checkpoint)

    def activations(self, micro_batch: int, accumulates: bool) -> float:
        """Bytes that one micro-batch needs at most at one time beside weights and gradients; 0 if gradients need more later."""
        return float(self._on_paper.peak(micro_batch, self.setup.seq_len, accumulates, self.setup.packed))

    def state(self) -> dict[str, float]:
        """Bytes that stay from step to step."""
        setup, shards = self.setup, self.setup.num_processes if self.setup.fsdp else 1
        number = sum(parameter.numel() for parameter in self.model.parameters())
        moments = sum(
            math.prod(shape) * dtype.itemsize
            for group in parameter_groups(setup.optimizer, self.model, 0.0, "all")
            for parameter in group["params"]
            for shape, dtype in needed_moments(group, parameter).values()
        )
        state = {"weights": 4 * number / shards, "gradients": 4 * number / shards, "moments": moments / shards}
        if setup.num_processes > 1 and not setup.fsdp:
            state["gradients"] *= 2  # buckets of DistributedDataParallel
        return state

    def needs(self, activations: float) -> Needs:
        """All, with so many bytes of activations."""
        setup, state, computing = self.setup, self.state(), {"activations": activations}
        if setup.fsdp:
            computing["gathered"] = _gathered(self.model, setup)
        copies = {"checkpoints": (1 + setup.fsdp) * (state["weights"] + state["moments"])}  # a file is made in memory first
        unknown = math.inf if setup.device_bytes else _free_memory()
        in_process = (setup.host_bytes or unknown) / setup.local_processes
        if not setup.is_gpu:
            return Needs(state | computing | copies | {"libraries": LIBRARIES["cpu"]}, {}, in_process, in_process)
        on_device, in_memory = (computing, state) if setup.cpu_offload else (state | computing, {})
        weights = 4.0 * sum(parameter.numel() for parameter in self.model.parameters())
        host = {"building": weights, "libraries": LIBRARIES["cpu"]} | copies | in_memory
        there = setup.device_bytes or torch.cuda.mem_get_info(setup.device)[0]
        return Needs(on_device | {"libraries": LIBRARIES["cuda"]}, host, there, in_process)


def _gathered(model: PreTrainedModel, setup: Setup) -> float:
    """What is whole at a time: what is outside of blocks, and two blocks, of which one is computing and one arriving."""
    in_blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks(model)]
    outside = sum(parameter.numel() for parameter in model.parameters()) - sum(in_blocks)
    largest = max(in_blocks, default=0)
    return DTYPES[setup.precision].itemsize * (outside + 2 * largest) + 4 * max(outside, largest)  # and one's gradient


def operations(model: PreTrainedModel, seq_len: int) -> float:
    """Operations for one token, forward and backward: 6 for each weight that multiplies, 12 x layers x width x context / 2 for
    causal attention (Kaplan et al., arXiv 2001.08361; Chowdhery et al., arXiv 2204.02311, appendix B).
    """
    config, table = model.config, model.get_input_embeddings().weight
    multiplied = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    if model.get_output_embeddings().weight is not table:
        multiplied -= table.numel()
    return 6 * multiplied + 6 * config.num_hidden_layers * config.hidden_size * seq_len


def _seconds(model: PreTrainedModel, setup: Setup) -> float:
    speed = setup.operations_per_sec or _matrix_speed(model.config.hidden_size, setup)
    speed *= SHARE_OF_SPEED["cuda" if setup.is_gpu else "cpu"] * setup.num_processes
    again = 4 / 3 if setup.grad_checkpoint else 1
    return again * operations(model, setup.seq_len) * setup.tokens / speed


def _matrix_speed(width: int, setup: Setup) -> float:
    """Operations a second of this process in a product of (tokens, width) and (width, 4 width)."""
    rows = 4096 if setup.device.type == "cuda" else 256
    dtype = DTYPES[setup.precision]
    a = torch.ones(rows, width, dtype=dtype, device=setup.device)
    b = torch.ones(width, 4 * width, dtype=dtype, device=setup.device)
    times = [_timed(lambda: a @ b, setup.device) for _ in range(4)]
    return 2 * rows * width * 4 * width / min(times)


def _timed(compute: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def _free_memory() -> float:
    """Bytes of memory that this machine could still give out, or that its job scheduler allows."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError):  # not Linux: what there is at all
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError):  # no cgroups of version 2
        own = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        return min(free, free_in_cgroup(Path("/sys/fs/cgroup"), own))
    return free


def free_in_cgroup(root: Path, name: str) -> float:
    """Bytes that cgroup `name` and those above it leave; infinite without a limit. File pages that can be dropped are free."""
    free = math.inf
    for folder in (root / name, *(root / name).parents):
        with contextlib.suppress(OSError, ValueError):  # the root has no limit; "max" is none
            limit, used = (int((folder / file).read_text()) for file in ("memory.max", "memory.current"))
            droppable = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["inactive_file"]
            free = min(free, limit - used + int(droppable))
    return free


def gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if math.isfinite(size) else "what there is"


def listed(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {size / 2**30:.3g}" for name, size in parts.items())


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.0f} seconds"
