"""Command lines: a frozen dataclass is the arguments, their help and their defaults. Light to import: no torch here."""

import math
from dataclasses import asdict, dataclass
from typing import Literal, TypeVar

import tyro

T = TypeVar("T")
Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class RunArgs:
    """What every trainer takes."""

    output_dir: str
    """Folder of the run: checkpoints, logs, final model. The same command run again goes on where it stopped."""
    seed: int = 0
    """Decides the initial weights and, with the step, every example."""
    resume_from: str = "auto"
    """auto: newest good checkpoint if there is one; latest: the same, but there must be one; a folder: that checkpoint."""
    precision: Precision = "fp32"
    """Arithmetic of the forward and backward pass; parameters and moments are always float32. fp16 and tf32 (float32 whose
    matrices multiply with 10 bits of mantissa) need a GPU."""
    force_cpu: bool = False
    """Do not use a GPU even if there is one."""
    deterministic: bool = True
    """Only deterministic kernels, without which a repeated run differs in the last bits on a GPU; an operation that has none
    ends the run. --no-deterministic is faster on some models."""
    detect_anomaly: bool = False
    """Let autograd name the operation that made a NaN (several times slower)."""
    checkpoint_interval_steps: int = 500
    """Optimizer steps between checkpoints: so many are repeated after a kill, and those made while the last one was written."""
    max_step_checkpoints: int = 3
    """Newest checkpoints that are kept."""
    ledger: bool = False
    """Write down which examples form each step, about 50 bytes a row, in logs/ledger.jsonl; report.py ledger checks it."""
    dirty: bool = False
    """Also run code that is not committed; what differs from the commit is kept in the run's folder as uncommitted.diff."""
    profile: bool = False
    """Trace five steps after three that warm up, print where a step goes, and write RUN/profile/."""
    wandb_project: str | None = None
    """Also log to this Weights & Biases project (WANDB_MODE=offline works without a network)."""
    wandb_run_name: str | None = None
    """Name of the run there; by default the name of the output folder."""

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = below(self, 1, "checkpoint_interval_steps", "max_step_checkpoints")
        if not 0 <= self.seed < 2**63:
            found.append(f"--seed {self.seed}: a number from 0 to 2**63 - 1 is needed")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"--{name} {value}: a finite number is needed")
        return found


def parse(cls: type[T], argv: list[str] | None = None) -> T:
    """The command line as an instance of the dataclass `cls`; --micro_batch and --micro-batch are the same."""
    return tyro.cli(cls, args=argv, use_underscores=True)


def below(args: object, least: int, *names: str) -> list[str]:
    """A fault for each of these arguments that is given and less than `least`."""
    values = ((name, getattr(args, name)) for name in names)
    return [f"--{name} {value}: at least {least} is needed" for name, value in values if value is not None and value < least]


def outside_0_to_1(args: object, *names: str) -> list[str]:
    """A fault for each of these arguments that is no share."""
    values = ((name, getattr(args, name)) for name in names)
    return [
        f"--{name} {value}: a number in [0, 1] is needed (98 percent is 0.98)" for name, value in values if not 0 <= value <= 1
    ]


def not_positive(args: object, *names: str) -> list[str]:
    """A fault for each of these arguments that is given and not more than 0."""
    values = ((name, getattr(args, name)) for name in names)
    return [f"--{name} {value}: more than 0 is needed" for name, value in values if value is not None and not value > 0]


def check(faults: list[str]) -> None:
    """Raise one ValueError that lists every fault, if there are any."""
    if faults:
        raise ValueError("\n".join(faults))
