"""Which examples form each micro-batch, on any number of processes, and the loader that makes them ahead."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import recursively_apply
from torch.utils.data import DataLoader, Dataset

from lm.run import signals_kept_from_children

Make = Callable[..., Any]


def rows_of_step(data_step: int, micro_batch: int, grad_accum: int, accelerator: Accelerator) -> list[range]:
    """The examples of each micro-batch of this process.

    Row j of step s is example `s * effective_batch + j`, whatever the number of processes: micro-batch m of process p
    holds the rows from `(m * num_processes + p) * micro_batch` on.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    starts = [((data_step * grad_accum + m) * processes + process) * micro_batch for m in range(grad_accum)]
    return [range(start, start + micro_batch) for start in starts]


class Loader:
    """The micro-batches of one step after another, made ahead, once the first is asked for, by processes that are started now.

    To be made before the model is: a fork keeps the memory that it finds, and each first write to it makes the trainer copy a
    page; and while no other thread works, whose locks it would copy as it finds them.

    Args:
        make: (examples of a micro-batch, *what else it depends on) -> micro-batch.
        micro_batch, grad_accum: as in `rows_of_step`.
        num_workers: processes that work ahead; 0 makes each micro-batch when it is asked for.
    """

    def __init__(self, make: Make, micro_batch: int, grad_accum: int, num_workers: int, accelerator: Accelerator):
        self._grad_accum, self._next = grad_accum, None
        self._orders = _Orders(micro_batch, grad_accum, accelerator)
        pin = accelerator.device.type == "cuda"
        if num_workers == 0:  # a DataLoader in its own process takes .1 ms, a micro-batch of windows .02
            self._made = map(_Maker(_pinned(make) if pin else make).__getitems__, self._orders)
            return
        options = {"num_workers": num_workers, "pin_memory": pin, "collate_fn": _as_it_is}
        with signals_kept_from_children():
            self._made = iter(DataLoader(_Maker(make), batch_sampler=self._orders, **options))

    def step(self, data_step: int, *what: Any) -> list[Any]:
        """This process's micro-batches of a step.

        If it is not the step after the last one, or something else is asked for, what has been made ahead is thrown away.
        """
        if (data_step, *what) != self._next:
            self._orders.begin(data_step, *what)
        self._next = (data_step + 1, *what)
        return [self._take() for _ in range(self._grad_accum)]

    def _take(self) -> Any:
        while True:
            turn, micro_batch = next(self._made)
            if turn == self._orders.turn:
                return micro_batch


class _Orders:
    """What is to be made next, asked for in the trainer's process; each order has the number of its beginning."""

    def __init__(self, *layout: Any):
        self.layout, self.turn = layout, 0
        self.orders = itertools.repeat((0, None, ()))  # nothing, of which a DataLoader asks for some while it starts

    def begin(self, data_step: int, *what: Any) -> None:
        self.turn += 1
        rows = itertools.chain.from_iterable(rows_of_step(step, *self.layout) for step in itertools.count(data_step))
        self.orders = zip(itertools.repeat(self.turn), rows, itertools.repeat(what), strict=False)

    def __iter__(self) -> Iterator[tuple[int, range, tuple]]:
        while True:
            yield next(self.orders)


class _Maker(Dataset):
    def __init__(self, make: Make):
        self.make = make

    def __getitems__(self, order: tuple[int, range, tuple]) -> tuple[int, Any]:
        turn, rows, what = order
        return turn, self.make(rows, *what) if turn else None


def _pinned(make: Make) -> Make:
    """The same, in page-locked memory, out of which a GPU copies while the trainer goes on."""
    return lambda *order: recursively_apply(torch.Tensor.pin_memory, make(*order))


def _as_it_is(micro_batch: Any) -> Any:
    """The maker makes whole micro-batches already."""
    return micro_batch
