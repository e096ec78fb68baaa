"""What a trainer does about faults: where it goes on from, and what follows an update that is not finite."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device

from lm.checkpoint import Checkpoints, damage
from lm.files import whole_file
from lm.run import Run, main_decides
from lm.step import StepResult

ATTEMPTS = 3  # at one step: a fault of the machine is gone the second time, one of the data or the weights is not
MAX_ROLLBACKS = 3  # to one checkpoint


def find_checkpoint(run: Run, checkpoints: Checkpoints, resume_from: str) -> Path | None:
    """The checkpoint to go on from, the same on every process, or None to start anew.

    Raises: FileNotFoundError if one was asked for and there is none; ValueError if the one asked for is damaged.
    """
    return main_decides(run.accelerator, lambda: choose_checkpoint(checkpoints, resume_from))


def choose_checkpoint(checkpoints: Checkpoints, resume_from: str) -> Path | None:
    """The same in one process."""
    checkpoints.put_back()
    if resume_from not in ("auto", "latest"):
        path = Path(resume_from)
        if not path.is_dir():
            raise FileNotFoundError(f"no checkpoint {path}: pass a step_* folder, or --resume_from latest")
        foreign = path.resolve().parent != checkpoints.folder.resolve()
        if foreign and (own := _newest_good(checkpoints)):
            return own  # another run's checkpoint is only where this one began
        if fault := damage(path):
            raise ValueError(f"{path} is damaged ({fault}): pass another, or --resume_from latest for the newest good one")
        if not (path / "state.json").exists():
            raise ValueError(f"{path} is a model without the state of its training: pass one of the step_* folders")
        return path
    path = _newest_good(checkpoints)
    if path is None and (final := checkpoints.folder.parent / "final").exists():
        raise FileNotFoundError(f"{final} is there but no checkpoint, a new start would replace it: pass another --output_dir")
    if path is None and resume_from == "latest":
        raise FileNotFoundError(f"no checkpoint in {checkpoints.folder}: leave out --resume_from to start the run")
    return path


def _newest_good(checkpoints: Checkpoints) -> Path | None:
    """None if there are no checkpoints. Raises: FileNotFoundError if none of them is good."""
    path = checkpoints.newest_good()
    if path is None and checkpoints.paths():
        raise FileNotFoundError(f"every checkpoint in {checkpoints.folder} is damaged: mend one, or pass another --output_dir")
    return path


def refuse_another_run(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError, naming each value that differs, unless the checkpoint continues the run that was asked for."""
    differing = [f"{key}: saved {saved.get(key)}, now {now.get(key)}" for key in now | saved if saved.get(key) != now.get(key)]
    if differing:
        raise ValueError(
            f"cannot resume {path}, the run would not be the same ({'; '.join(differing)}):"
            " pass the saved values, or another --output_dir for another run"
        )


def step_or_none(
    run: Run,
    where: dict[str, int],
    micro_batches: Sequence[Any],
    attempt: Callable[[], StepResult],
    source: Callable[[], Any],
    first: StepResult | None = None,
) -> StepResult | None:
    """Make one step, again if it was not finite; None after three attempts, on every process alike.

    Each failed attempt changed nothing. It is an event that names the tensors, and the batch is saved for replay as
    RUN/problematic_batch.pt (problematic_batch_1.pt on process 1, and so on).

    Args:
        where: the step and the data step, for the record.
        attempt: makes the step.
        source: says where the rows came from, for the saved batch.
        first: what the first attempt gave, if it was made already.
    """
    for number in range(1, ATTEMPTS + 1):
        result = attempt() if first is None or number > 1 else first
        if result.applied:
            return result
        process = run.accelerator.process_index
        faults = gather_object([f"{name} on process {process}" for name in result.faults])
        faults.sort(key=lambda name: name.startswith("gradient"))  # which every process sees: first, where it came from
        batch = {
            "micro_batches": send_to_device(list(micro_batches), "cpu"),
            "faults": list(result.faults),
            "source": source(),
            **where,
        }
        with whole_file(run.folder / f"problematic_batch{f'_{process}' if process else ''}.pt") as partial:
            torch.save(batch, partial)
        run.log.event(
            "not_finite", **where, attempt=number, loss=str(result.loss), grad_norm=str(result.grad_norm), faults=faults[:10]
        )
    return None
