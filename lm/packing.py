"""Examples of different lengths packed into rows, so that a forward pass costs their tokens and not their padding.

Each example keeps its own positions (0, 1, ...) and sees nothing but itself: transformers masks attention between examples
wherever position ids restart, if it is given no attention mask and no cache. `sees_only_itself` checks that for a model.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

Loss = Literal["weighted", "answer_only"]
Batch = dict[str, torch.Tensor]
MOST_ROW_COUNTS = 64  # tried for one micro-batch


def pack(examples: Sequence[np.ndarray], answer_tokens: Sequence[int], loss: Loss, reach: float | None) -> Batch:
    """One micro-batch: n examples in R rows of W targets.

    Args:
        examples: 1-D ids of each, the prompt and then `answer_tokens` ids of the answer, its EOS included.
        loss: "weighted": an answer's targets weigh 1 + (targets of the example) / (answer tokens), all others 1, so that the
            answer is half of each example's weight. "answer_only": answer tokens weigh 1, all others 0.
        reach: tokens of context at which attention costs as much as all else (`attention_reach`); None puts every example in a
            row of its own.

    Returns, all of shape (R, W) but for the last two:
        input_ids, targets: int64. position_ids: int64, from 0 in each example. weights: float32, 0 where nothing is trained.
        answer: bool, at targets of an answer. example: int64, index of the example; n where there is none.
        lengths: int64 (n,), targets of each example. trained: int64, the places of `weights` that are not 0, all rows in one.
    """
    lengths = [len(ids) - 1 for ids in examples]
    rows = [[number] for number in range(len(examples))] if reach is None else choose_rows(lengths, reach)
    shape = len(rows), max(sum(lengths[number] for number in row) for row in rows)
    inputs, targets, positions = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    weights, answer = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    example = np.full(shape, len(examples))
    for r, row in enumerate(rows):
        start = 0
        for number in row:
            ids, stop, in_answer = examples[number], start + lengths[number], answer_tokens[number]
            inputs[r, start:stop], targets[r, start:stop] = ids[:-1], ids[1:]
            positions[r, start:stop] = np.arange(stop - start)
            weights[r, start:stop] = loss == "weighted"
            weights[r, stop - in_answer : stop] = 1 + (stop - start) / in_answer if loss == "weighted" else 1
            answer[r, stop - in_answer : stop] = True
            example[r, start:stop] = number
            start = stop
        # Padding goes on with the last example, which cannot see it: where no row holds two, no mask is needed at all.
        padding = lengths[row[-1]] + np.arange(shape[1] - start)
        positions[r, start:] = np.minimum(padding, max(lengths) - 1)
    arrays = {"input_ids": inputs, "targets": targets, "position_ids": positions, "weights": weights}
    arrays |= {"answer": answer, "example": example, "lengths": np.array(lengths), "trained": np.flatnonzero(weights)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def row_ids(batch: Batch) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each example that `pack` packed, in their order."""
    example = batch["example"].numpy().ravel()
    order = np.argsort(example, kind="stable")
    ends = np.searchsorted(example[order], np.arange(len(batch["lengths"])), side="right")
    inputs, targets = (np.split(batch[name].numpy().ravel()[order], ends)[:-1] for name in ("input_ids", "targets"))
    return zip(inputs, targets, strict=True)


def choose_rows(lengths: Sequence[int], reach: float) -> list[list[int]]:
    """Which examples share a row: the number of rows that costs least, each example in the row that is shortest so far.

    R rows of W tokens cost R * W * (reach + W): everything but attention is paid by the token, attention by the pair. Taking
    the longest examples first keeps rows even (Graham, "Bounds on multiprocessing timing anomalies", 1969).
    """
    longest_first = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    counts = sorted({round(count) for count in np.geomspace(1, len(lengths), MOST_ROW_COUNTS)})
    best, best_cost = [], np.inf
    for count in counts:
        rows: list[list[int]] = [[] for _ in range(count)]
        shortest = [(0, r) for r in range(count)]
        for number in longest_first:
            used, r = shortest[0]
            rows[r].append(number)
            heapq.heapreplace(shortest, (used + lengths[number], r))
        width = max(shortest)[0]
        cost = count * width * (reach + width)
        if cost < best_cost:
            best, best_cost = rows, cost
    return [row for row in best if row]


def attention_reach(model: PreTrainedModel) -> float:
    """Tokens of context at which attention costs a model as much as its matrices do.

    A token costs 2 * N operations in matrices of N numbers, and 4 * layers * hidden * context in attention (Kaplan et al.,
    arXiv 2001.08361, section 2.1).
    """
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim >= 2)
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or inputs.weight is not outputs.weight:
        matrices -= inputs.weight.numel()  # looked up, not multiplied
    return matrices / (2 * model.config.num_hidden_layers * model.config.hidden_size)


@torch.no_grad()
def sees_only_itself(model: PreTrainedModel) -> bool:
    """Whether two examples packed into one row get the logits that each gets alone."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(model.config.vocab_size, (2, 16), generator=generator).to(model.device)
    training = model.training
    model.eval()
    alone = model(input_ids=torch.stack([first, second]), use_cache=False).logits
    positions = torch.arange(16, device=model.device).repeat(2)[None]
    together = model(input_ids=torch.cat([first, second])[None], position_ids=positions, use_cache=False).logits
    model.train(training)
    difference = (together.view(alone.shape) - alone).abs().max()
    return bool(difference < 1e-4 * alone.std())
