"""trl's SFTTrainer with the checkpoints, records and stops of every other trainer here."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from lm import draws
from lm.checkpoint import Checkpoints
from lm.fsdp import is_sharded, reshard
from lm.optim import set_beta1
from lm.recovery import ATTEMPTS
from lm.run import Run
from lm.schedule import Schedule
from lm.session import finish_writing
from lm.sft_batches import Collator
from lm.sharded_checkpoint import load_any
from lm.trainer_args import TrainerArgs, optimizer_of


@dataclass(frozen=True)
class Course:
    """What a run of fine-tuning is made of, from its first step to its last."""

    dataset: Dataset  # the examples of every step, in order
    tokens: list[tuple[int, int]]  # after each number of steps: tokens read, and among them the assistant's
    grad_accum: int
    total_steps: int
    schedule: Schedule
    collator: Collator
    identity: dict[str, Any]  # a checkpoint only continues a run with the same


class ChatTrainer(SFTTrainer):
    """The steps of a course that come after a checkpoint, or all.

    Going on is a new trainer for the steps that are left: what a step trains on, its learning rate and its random numbers are
    functions of (data, seed, step), so nothing but weights and moments is loaded, and no pickle is read.

    Args:
        resume: the checkpoint and its step; (None, 0) begins with the model as it is.
        look: called with the number of finished steps before the first step and after the last: it evaluates.
    """

    def __init__(
        self,
        args: TrainerArgs,
        config: SFTConfig,
        course: Course,
        run: Run,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        checkpoints: Checkpoints,
        resume: tuple[Path | None, int],
        look: Callable[[PreTrainedModel, int], None],
    ):
        self.own, self.course, self.run, self.checkpoints, self.look = args, course, run, checkpoints, look
        self.resume_path, self.first_step = resume
        self.stopped = 0  # the signal that asked for it
        self.skipped = 0  # steps in a row
        if is_sharded(model):  # as transformers itself may do while it loads: then its Trainer leaves the model as it is
            model._is_distributed_loading_by_transformers = True
        model.accepts_loss_kwargs = True  # whatever its forward says: the loss is divided by the tokens of the whole step
        rows = len(course.dataset) // course.total_steps
        left = course.dataset.select(range(self.first_step * rows, len(course.dataset)))
        super().__init__(
            model=model, args=config, train_dataset=left, data_collator=course.collator, processing_class=tokenizer
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(StepCallback(self))

    @property
    def step(self) -> int:
        """Finished optimizer steps of the whole run."""
        return self.first_step + self.state.global_step

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that the arguments name."""
        self.optimizer = optimizer_of(self.own, model or self.model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """The learning rate as a function of the step of the whole run."""
        factor, first = self.course.schedule.factor, self.first_step
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: factor(first + step))
        return self.lr_scheduler

    def begin(self) -> None:
        """Put weights and moments of the checkpoint back, or evaluate and save the beginning."""
        if self.resume_path is not None:
            load_any(self.resume_path, self.model, self.optimizer)
        own = self.resume_path is not None and self.resume_path.resolve().parent == self.checkpoints.folder.resolve()
        if self.step == 0 or not own:
            self.evaluate_here()
        if not own:
            self.save()

    def save(self) -> None:
        """Checkpoint everything; the log up to here is made durable first."""
        self.run.log.sync()
        self.checkpoints.save(self.step, self.model, self.optimizer, {"identity": self.course.identity})

    def evaluate_here(self) -> None:
        """Evaluate the model as it is."""
        self.look(self.model, self.step)
        reshard(self.model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the step's gradient, the same on every process; one that is not finite updates nothing on any of them."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(norm):
            model.zero_grad(set_to_none=True)  # without a gradient no optimizer touches a parameter or its moments
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step, before it can be saved. Raises: RuntimeError, on every process, after three that were not finite."""
        if "loss" in logs:
            read, trained = self.course.tokens[self.step]
            loss, norm = logs["loss"], float(logs["grad_norm"])
            self.skipped = 0 if math.isfinite(loss + norm) else self.skipped + 1
            if self.skipped:
                self._tr_loss.zero_()  # transformers takes off what it has logged, and NaN would stay
                self.run.log.event("not_finite", step=self.step, in_a_row=self.skipped, loss=str(loss), grad_norm=str(norm))
                if self.skipped == ATTEMPTS:
                    raise RuntimeError(
                        f"steps {self.step - ATTEMPTS + 1} to {self.step} had no finite loss and gradient (the last: {loss} and"
                        f" {norm}), and changed nothing: the weights of step {self.step - ATTEMPTS} are the cause; lower --lr"
                        " or pass --precision fp32, with another --output_dir"
                    )
                loss = norm = None
            self.run.log.train(self.step, read, loss=loss, lr=logs["learning_rate"], grad_norm=norm, assistant_tokens=trained)
        self._metrics["train"].clear()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """What transformers calls where `control.should_save` asks for it, after the step is logged."""
        if self.step == self.course.total_steps:
            self.evaluate_here()
        self.save()

    def _send_telemetry(self) -> None:
        """Nothing is told to anybody; trl would report model and dataset to its server."""


class StepCallback(TrainerCallback):
    """What is done between the steps."""

    def __init__(self, trainer: ChatTrainer):
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The seed is for dropout."""
        trainer = self.trainer
        torch.manual_seed(draws.torch_seed(trainer.own.seed, trainer.step, trainer.accelerator.process_index))
        if (beta1 := trainer.course.schedule.beta1(trainer.step)) is not None:
            set_beta1(trainer.optimizer, beta1)

    def on_step_end(self, _args: Any, _state: Any, control: Any, **__: Any) -> None:
        """Save if it is time to, and stop if a signal asks any process to."""
        trainer = self.trainer
        stop, write_failed = trainer.run.agree(trainer.run.stop.received, trainer.checkpoints.failed())
        if write_failed:
            finish_writing(trainer.run, trainer.checkpoints)
        done = trainer.step == trainer.course.total_steps
        control.should_save = bool(stop) or done or trainer.step % trainer.own.checkpoint_interval_steps == 0
        if stop and not done:
            trainer.stopped, control.should_training_stop = stop, True
