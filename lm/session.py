"""What every trainer has between its steps: model, optimizer, progress and checkpoints, and how a run goes on after a stop."""

import functools
import gc
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm import draws
from lm.args import RunArgs
from lm.checkpoint import Checkpoints, damage, read_fields, set_aside
from lm.files import read_json
from lm.fsdp import is_sharded
from lm.profiling import Profile, part
from lm.recovery import MAX_ROLLBACKS, find_checkpoint, refuse_another_run, step_or_none
from lm.run import Run, main_decides
from lm.sharded_checkpoint import ShardedCheckpoints, load_any
from lm.step import LossSum, StepResult, Unread, can_hold, read, settle, train_step

MOST_UNREAD = 16  # steps
READ_WITHIN_SEC = 1.0


@dataclass
class Progress:
    """What the next step needs to know beside weights and moments; stored in state.json. Trainers add their own fields."""

    step: int = 0  # finished optimizer steps
    data_offset: int = 0  # step s trains on the rows of step s + data_offset: grows when a stretch is stepped over

    @property
    def data_step(self) -> int:
        """The step whose rows the next step trains on."""
        return self.step + self.data_offset


@dataclass(frozen=True)
class Asked:
    """A step as the trainer asked for it."""

    step: int  # its number, from 1 on
    data_step: int  # the step whose rows it trains on
    micro_batches: Sequence[Any]
    weight: float
    lr: float
    max_grad_norm: float
    source: Callable[[], Any]
    beta1: float | None
    also: Any


@dataclass(frozen=True)
class Made:
    """A step that was made, and what came of it."""

    step: int
    data_step: int
    lr: float
    also: Any  # what the trainer wanted back
    time: float  # when the device was given it, in seconds since 1970
    result: StepResult


class Session:
    """One run in one process.

    The device is given one step after another without being waited for, and what came of them is read together: at most
    `MOST_UNREAD` steps or about a second late, and wherever the trainer wants to look, evaluate or save. The first step that is
    not finite holds back itself and all that follow, on the device, so reading it late changes nothing.

    Args:
        bare: the model as transformers knows it; `self.model` may be wrapped for several processes.
        loss_sum, sample: what a step minimises, and any micro-batch of it (see `lm.step.settle`).
        progress: that of a run that has not begun.
        identity: what makes two runs the same run; a checkpoint only continues a run with the same.
    """

    def __init__(
        self,
        args: RunArgs,
        run: Run,
        bare: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        loss_sum: LossSum,
        sample: Any,
        progress: Progress,
        identity: dict[str, Any],
    ):
        self.args, self.run, self.accelerator, self.bare, self.loss_sum = args, run, run.accelerator, bare, loss_sum
        if is_sharded(bare):  # for its autocast alone: nothing is to be wrapped or moved
            self.model = self.accelerator.prepare_model(bare, device_placement=False, evaluation_mode=True)
            self.optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        else:
            self.model, self.optimizer = self.accelerator.prepare(bare, optimizer)
        self.checkpoints = open_checkpoints(run, bare, args.max_step_checkpoints)
        settle(self.accelerator, self.model, send_to_device(sample, self.accelerator.device), loss_sum)
        self.progress, self.identity = progress, identity
        self._held = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        self._can_hold = can_hold(self.accelerator, self.optimizer, bare)
        self._unread: list[tuple[Asked, Unread, float]] = []
        self._most_unread, self._last_agreed = 1, time.monotonic()
        self._stop = 0  # the signal that came to any process, as of the last reading
        self.rollbacks: Counter[int] = Counter()
        self._rolled_back: dict[str, Any] = {}  # what the event says of it
        self.profile: Profile | None = None

    def resume(self) -> None:
        """Go on from the checkpoint that the arguments name, or save the beginning as step 0.

        That first checkpoint is what a fault early on rolls back to, and a disk that cannot hold one is found at once.
        """
        path = find_checkpoint(self.run, self.checkpoints, self.args.resume_from)
        if path is not None:
            refuse_another_run(path, read_fields(path / "state.json", {"identity": dict})["identity"], self.identity)
            self._restore(path)
        main_decides(self.accelerator, lambda: self.run.log.cut_back(self.progress.step))
        now = {"step": self.progress.step, "num_processes": self.accelerator.num_processes} | self.run.tree.record
        self.run.log.event("resumed" if path else "started", **now)
        if path is None or path.resolve().parent != self.checkpoints.folder.resolve():
            self._save()
        if self.args.profile:
            self.profile = Profile(self.run, self.bare)
        gc.freeze()  # a full collection walks all that was imported, half a second in the middle of a step
        gc.disable()
        self.run.at_end.callback(gc.enable)

    def make_step(
        self,
        micro_batches: Sequence[Any],
        weight: float,
        lr: float,
        max_grad_norm: float,
        source: Callable[[], Any],
        beta1: float | None = None,
        look: bool = True,
        also: Any = None,
    ) -> list[Made] | None:
        """Give the device one more step, and return those that have been read since, in their order, each once.

        None if one of them stayed non-finite and the run went back to its last checkpoint (`lm.recovery`): then the trainer
        calls `end_rollback`.

        Args:
            weight: what this process's losses weigh together.
            max_grad_norm: 0 clips nothing.
            source: says where the rows came from, for the saved batch.
            beta1: as in `lm.step.train_step`.
            look: whether the trainer wants to know all about this step now, as it does before it evaluates or waits.
            also: whatever the trainer wants back with the step.
        """
        step, data_step = self.progress.step + 1, self.progress.data_step
        clip = max_grad_norm or math.inf
        asked = Asked(step, data_step, micro_batches, weight, lr, clip, source, beta1, also)
        self.progress.step = step
        if self._can_hold:
            self._unread.append((asked, self._attempt(asked, self._held), time.time()))
            look = look or step % self.args.checkpoint_interval_steps == 0 or len(self._unread) >= self._most_unread
            if not look:
                return []
            made = self._read()
        else:
            surely = self._surely(asked)
            made = surely and [surely]
        if made is None:
            self._roll_back()
        else:
            self._agree(len(made))
        return made

    def _attempt(self, asked: Asked, held: torch.Tensor | None = None) -> Any:
        """Make a step, or give it to the device; the seed is for dropout."""
        torch.manual_seed(draws.torch_seed(self.args.seed, asked.data_step, self.accelerator.process_index))
        how = self.loss_sum, asked.weight, asked.lr, asked.max_grad_norm, asked.beta1, held
        return train_step(self.accelerator, self.model, self.optimizer, asked.micro_batches, *how)

    def _surely(self, asked: Asked, first: StepResult | None = None) -> Made | None:
        """Make a step, again if it is not finite, and know at once; None if it stays so."""
        where = {"step": asked.step, "data_step": asked.data_step}
        attempt = functools.partial(self._attempt, asked)
        result = step_or_none(self.run, where, asked.micro_batches, attempt, asked.source, first)
        if result is None:
            self.progress.step = asked.step - 1
            return None
        return Made(asked.step, asked.data_step, asked.lr, asked.also, time.time(), result)

    def _read(self) -> list[Made] | None:
        """What came of the steps that the device was given, those made again that it held back; None if one cannot be made."""
        waiting, self._unread, made, held = self._unread, [], [], False
        results = read([unread for _, unread, _ in waiting], self.bare, waiting[-1][0].max_grad_norm)
        for (asked, _, when), result in zip(waiting, results, strict=True):
            if result.applied and not held:
                made.append(Made(asked.step, asked.data_step, asked.lr, asked.also, when, result))
                continue
            self._held.zero_()
            again = self._surely(asked, None if held else result)  # what came after it was computed in vain
            if again is None:
                return None
            made.append(again)
            held = True
        return made

    def end_step(self, done: bool) -> bool:
        """Save if it is time to, and say whether a signal asks to stop before the run is done."""
        if self._unread:
            stop = 0
        elif (stop := self._stop) or done or self.progress.step % self.args.checkpoint_interval_steps == 0:
            self._save()
        if self.profile is not None:
            self.profile.step(self.progress.step)
        if stop and not done:
            self._say_stopped(stop)
        return bool(stop) and not done

    def stop_while_waiting(self) -> bool:
        """Whether a signal asks to stop, in which case all is saved; for a trainer that waits for its next rows."""
        self._agree(1)
        if self._stop:
            self._save()
            self._say_stopped(self._stop)
        return bool(self._stop)

    def give_up(self, error: Exception) -> NoReturn:
        """Save everything and raise `error`, on every process."""
        self._save()
        self._finish_writing()  # together: a launcher that sees one process end would not let the main one finish writing
        raise error

    def finish(self, tokenizer, about: dict[str, Any]) -> bool:
        """Write the final model, with what its folder says of it; False if that was done before."""
        return write_final(self.run, self.checkpoints, self.bare, tokenizer, about)

    def _agree(self, steps: int) -> None:
        """Hear of signals to any process, and agree how many steps to leave unread next, after `steps` since the last time.

        Raises: RuntimeError if a checkpoint could not be written.
        """
        now = time.monotonic()
        in_time = int(READ_WITHIN_SEC * steps / max(now - self._last_agreed, 1e-6))
        self._stop, write_failed, fewest = self.run.agree(self.run.stop.received, self.checkpoints.failed(), -in_time)
        self._most_unread, self._last_agreed = max(1, min(MOST_UNREAD, -fewest)), now
        if write_failed:
            self._finish_writing()

    def _finish_writing(self) -> None:
        finish_writing(self.run, self.checkpoints)

    def _say_stopped(self, stop: int) -> None:
        say_stopped(self.run, self.checkpoints, self.progress.step, stop)

    def _restore(self, path: Path) -> None:
        """Make everything what it was when this checkpoint was saved."""
        kinds = get_type_hints(type(self.progress))
        state = read_fields(path / "state.json", kinds | {"loss_scale": dict[str, float] | None})
        scaler = self.accelerator.scaler
        if (scaler and scaler.state_dict().keys()) != (state["loss_scale"] and state["loss_scale"].keys()):
            raise ValueError(
                f"{path}/state.json has loss_scale {state['loss_scale']!r:.80}, of another --precision: pass another"
            )
        load_any(path, self.bare, self.optimizer)
        self.progress = type(self.progress)(**{name: state[name] for name in kinds})
        if self.accelerator.is_main_process:
            self.checkpoints.leave_after(self.progress.step)
        if scaler is not None:
            scaler.load_state_dict(state["loss_scale"])

    @part("checkpoint")
    def _save(self) -> None:
        """Checkpoint everything; the log up to here is made durable first."""
        assert not self._unread, "a step that nobody has looked at may not have been made"
        gc.collect()
        self.run.log.sync()
        scaler = self.accelerator.scaler
        state = asdict(self.progress) | {"loss_scale": scaler and scaler.state_dict(), "identity": self.identity}
        self.checkpoints.save(self.progress.step, self.bare, self.optimizer, state)

    def _roll_back(self) -> None:
        """Return to the newest good checkpoint, and step over the data from there up to and with the step that failed.

        Raises: RuntimeError if that has been done from the same checkpoint three times.
        """
        self._finish_writing()
        path = find_checkpoint(self.run, self.checkpoints, "latest")
        failed_at, bad = self.progress.step + 1, self.progress.data_step
        self._restore(path)
        step, first = self.progress.step, self.progress.data_step
        self.rollbacks[step] += 1
        if self.rollbacks[step] > MAX_ROLLBACKS:
            self.run.log.event("diverged", step=failed_at)
            raise RuntimeError(
                f"{MAX_ROLLBACKS} stretches of data after {path.name} all made the loss or gradient non-finite: the data is not"
                f" the cause; lower --lr, or look at {self.run.folder}/problematic_batch.pt and events.jsonl"
            )
        self.progress.data_offset = bad + 1 - step
        main_decides(self.accelerator, lambda: self.run.log.cut_back(step))
        self._rolled_back = {"from_step": failed_at, "to_step": step, "data_steps_left_out": [first, bad]}

    def end_rollback(self) -> None:
        """Write the checkpoint that the run went back to again, with what is left out, so that no kill brings that back.

        For the trainer to call when `make_step` has returned None and what follows from the data step is put right.
        """
        self._save()
        self._finish_writing()
        self.run.log.event("rolled_back", **self._rolled_back)


def open_checkpoints(run: Run, model: PreTrainedModel, keep: int) -> Checkpoints:
    """The run's checkpoints, each process's part of its own if the model is divided; closed when the run is left."""
    kind = ShardedCheckpoints if is_sharded(model) else Checkpoints
    checkpoints = kind(run.folder / "checkpoints", keep, run.accelerator.is_main_process)
    run.at_end.callback(checkpoints.close)
    return checkpoints


def finish_writing(run: Run, checkpoints: Checkpoints) -> None:
    """Return, on every process, once nothing is being written. Raises: RuntimeError on each of them if a write failed."""
    while any(run.agree(not checkpoints.idle(1.0))):  # NCCL ends a process that has waited for another for ten minutes
        pass
    failure = None
    try:
        checkpoints.wait()
    except RuntimeError as error:
        failure = error
    (failed,) = run.agree(failure is not None)
    if failed:
        raise failure or RuntimeError("the main process could not write a checkpoint: its message says why")


def say_stopped(run: Run, checkpoints: Checkpoints, step: int, stop: int) -> None:
    """The event of a run that a signal has stopped, once its checkpoint is written."""
    finish_writing(run, checkpoints)
    run.log.event("stopped", step=step, signal=signal.Signals(stop).name)


def write_final(
    run: Run, checkpoints: Checkpoints, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: dict[str, Any]
) -> bool:
    """Write the run's final model, with what its folder says of it; False if that was done before."""
    final = run.folder / "final"
    finish_writing(run, checkpoints)

    def is_written() -> bool:
        if final.exists() and (fault := damage(final)):
            run.log.say(f"warning: {final} is damaged ({fault}): setting it aside, and writing it again")
            set_aside(final, "damaged")
        return final.exists() and read_json(final / "about.json", "the training script") == about

    if main_decides(run.accelerator, is_written):
        run.log.say(f"{run.folder} was finished before")
        return False
    checkpoints.save_model(final, model, tokenizer, about)
    finish_writing(run, checkpoints)
    run.log.event("finished", **about)
    return True
