"""Which conversations form each step of fine-tuning, how they share rows without seeing each other, and their held-out loss."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset

from lm import draws
from lm.chat_format import Example
from lm.generation import passes
from lm.loss import token_losses
from lm.packing import choose_rows
from lm.precision import autocast

IGNORED = -100  # the label of what is not trained, for torch's cross-entropy, transformers and trl


def order_of(seed: int, num_examples: int, first: int, stop: int) -> np.ndarray:
    """The example at each place in [first, stop) of training: every one comes once an epoch, in another order each time."""
    epochs = range(first // num_examples, -(-stop // num_examples))
    orders = [draws.permutation(seed, f"conversations/{epoch}", num_examples) for epoch in epochs]
    begin = epochs.start * num_examples
    return np.concatenate([np.empty(0, dtype=np.int64), *orders])[first - begin : stop - begin]


def row_of(example: Example) -> dict[str, np.ndarray]:
    """What trl reads of an example."""
    return {"input_ids": example.ids, "labels": np.where(example.trained, example.ids, IGNORED)}


def as_dataset(examples: Sequence[Example], order: np.ndarray) -> Dataset:
    """The rows of the examples in this order."""
    rows = [row_of(example) for example in examples]
    return Dataset.from_dict({name: [row[name] for row in rows] for name in ("input_ids", "labels")}).select(order)


class Collator:
    """Conversations packed into rows, each with its own positions, which is what keeps them apart (lm/packing.py).

    Args: reach: as in `lm.packing.pack`; None puts every conversation in a row of its own.
    """

    def __init__(self, reach: float | None):
        self.reach = reach

    def __call__(self, rows: Sequence[dict[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """ "input_ids", "labels" (of the same places, as transformers has them) and "position_ids", all int64 (R, W)."""
        lengths = [len(row["input_ids"]) for row in rows]
        chosen = [[number] for number in range(len(rows))] if self.reach is None else choose_rows(lengths, self.reach)
        shape = len(chosen), max(sum(lengths[number] for number in row) for row in chosen)
        ids, positions = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        for r, row in enumerate(chosen):
            start = 0
            for number in row:
                stop = start + lengths[number]
                ids[r, start:stop], labels[r, start:stop] = rows[number]["input_ids"], rows[number]["labels"]
                labels[r, start] = IGNORED  # else it would be predicted from the conversation before
                positions[r, start:stop] = np.arange(stop - start)
                start = stop
            # Padding goes on with the last conversation, which cannot see it: where no row holds two, no mask is needed.
            positions[r, start:] = np.minimum(lengths[row[-1]] + np.arange(shape[1] - start), max(lengths) - 1)
        arrays = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@torch.no_grad()
def reply_loss(
    model: torch.nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    micro_batch: int,
    accelerator: Accelerator,
    precision: str,
) -> float:
    """The mean loss of the assistant's tokens of these examples, in nats; the processes share them, and all pass as often.

    Raises: RuntimeError, on every process, if it is not finite.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    groups = passes([len(example.ids) for example in examples], 0, micro_batch)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    was_training = model.training
    model.eval()
    for number in range(process, -(-len(groups) // processes) * processes, processes):
        group = groups[min(number, len(groups) - 1)]  # a sharded model needs every process in each pass
        batch = collator([row_of(examples[n]) for n in group])
        labels = batch.pop("labels")[:, 1:]
        trained = (labels != IGNORED).flatten().nonzero().flatten()
        inputs = {name: rows[:, :-1] for name, rows in batch.items()}
        labels, trained, inputs = send_to_device((labels, trained, inputs), accelerator.device)
        with autocast(accelerator.device, precision):
            nats = token_losses(model, labels, trained_M=trained, **inputs).nats
        if number < len(groups):
            sums += torch.stack([nats.double().sum(), torch.full_like(sums[1], len(trained))])
    model.train(was_training)
    total, count = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(total):
        raise RuntimeError(f"the held-out loss is {total}, a finite one is needed: lower --lr, or use --precision fp32")
    return total / count
