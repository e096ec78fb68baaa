"""Which examples form each micro-batch, on any number of processes, and the loader that makes them ahead."""

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, Sampler

from lm.run import signals_kept_from_children


class MicroBatches(Sampler[range]):
    """The examples of each micro-batch of one process, from a step on: a batch sampler for `DataLoader`.

    Row j of step s is example `s * effective_batch + j`, whatever the number of processes: micro-batch m of process p
    holds the rows from `(m * num_processes + p) * micro_batch` on.
    """

    def __init__(self, first_step: int, micro_batch: int, grad_accum: int, process: int, num_processes: int):
        self.first_step, self.micro_batch, self.grad_accum = first_step, micro_batch, grad_accum
        self.process, self.num_processes = process, num_processes

    def __iter__(self) -> Iterator[range]:
        block = self.first_step * self.grad_accum
        while True:
            start = (block * self.num_processes + self.process) * self.micro_batch
            yield range(start, start + self.micro_batch)
            block += 1


def load(dataset: Dataset, micro_batches: MicroBatches, num_workers: int, accelerator: Accelerator) -> Iterator[Any]:
    """What `dataset.__getitems__` makes of each range of examples, without end, `num_workers` processes working ahead."""
    pin = accelerator.device.type == "cuda"
    loader = DataLoader(dataset, batch_sampler=micro_batches, collate_fn=_as_it_is, num_workers=num_workers, pin_memory=pin)
    with signals_kept_from_children():
        return iter(loader)


def _as_it_is(micro_batch: Any) -> Any:
    """The dataset makes whole micro-batches already."""
    return micro_batch
