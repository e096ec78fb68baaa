"""How well a model answers held-out examples of the graph-search task, without and with generating."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm import draws
from lm.generation import passes
from lm.loss import packed_loss
from lm.packing import pack
from lm.precision import autocast
from lm.tokenizer import encode_documents


@dataclass(frozen=True)
class HeldOut:
    """Rows of a split as token ids, once for each of their valid answers; rows longer than `seq_len` are left out."""

    examples: list[np.ndarray]  # prompt, answer, EOS
    answer_tokens: list[int]  # of each example, EOS included
    row: list[int]  # of each example; a row's first example has the answer that was drawn as its label
    num_rows: int
    num_too_long: int


def encode_rows(rows: Sequence[dict], tokenizer: PreTrainedTokenizerFast, seq_len: float = math.inf) -> HeldOut:
    """Tokenise rows (`input_text`, `output_texts`) whole."""
    prompts = encode_documents(tokenizer, [row["input_text"] for row in rows])
    answers = iter(encode_documents(tokenizer, [f" {word}" for row in rows for word in row["output_texts"]]))
    examples, answer_tokens, numbers, kept = [], [], [], 0
    for row, prompt in zip(rows, prompts, strict=True):
        words = [np.append(next(answers), tokenizer.eos_token_id) for _ in row["output_texts"]]
        if len(prompt) + max(map(len, words)) > seq_len:
            continue
        for word in words:
            examples.append(np.concatenate([prompt, word]).astype(np.int64))
            answer_tokens.append(len(word))
            numbers.append(kept)
        kept += 1
    return HeldOut(examples, answer_tokens, numbers, kept, len(rows) - kept)


def encode_subset(rows: Sequence[dict], size: int, seed: int, tokenizer: PreTrainedTokenizerFast, seq_len: int) -> HeldOut:
    """`size` of the rows, at random but for one seed the same, tokenised."""
    chosen = np.sort(draws.permutation(seed, "held_out", len(rows))[:size])
    return encode_rows([rows[number] for number in chosen], tokenizer, seq_len)


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel, held_out: HeldOut, accelerator: Accelerator, precision: str, reach: float | None
) -> tuple[float, float]:
    """(accuracy, loss): the share of rows with a valid answer whose every token is the most likely one, and the mean loss of
    the labels in nats per answer token. EOS counts as a token of the answer. The processes share the rows.

    All tokens most likely is what greedy decoding needs to give that answer and then stop.

    Raises: RuntimeError, on every process, if the loss is not finite.
    """
    correct = np.zeros(held_out.num_rows, dtype=bool)
    losses = np.zeros(2)
    was_training = model.training
    model.eval()
    lengths = [len(ids) for ids in held_out.examples]
    all_passes = passes(lengths, 0, len(lengths))
    processes = accelerator.num_processes
    for first_pass in range(0, len(all_passes), processes):  # as many on each: a divided model needs all of them in a pass
        mine = first_pass + accelerator.process_index
        numbers = sorted(all_passes[min(mine, len(all_passes) - 1)])
        answer_tokens = [held_out.answer_tokens[number] for number in numbers]
        batch = pack([held_out.examples[number] for number in numbers], answer_tokens, "answer_only", reach)
        rows = [held_out.row[number] for number in numbers]
        first = torch.tensor([number == 0 or held_out.row[number - 1] != held_out.row[number] for number in numbers] + [False])
        batch["weights"] *= first[batch["example"]]
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with autocast(accelerator.device, precision):
            loss, _, right = packed_loss(model, batch)
        if mine >= len(all_passes):
            continue  # another process has counted it
        losses += [loss.item(), float(batch["weights"].sum())]
        np.logical_or.at(correct, rows, right.cpu().numpy())
    model.train(was_training)
    device = accelerator.device
    correct = accelerator.reduce(torch.from_numpy(correct).long().to(device), "sum") > 0
    total, weight = accelerator.reduce(torch.from_numpy(losses).to(device), "sum").tolist()
    if not math.isfinite(total):
        raise RuntimeError(f"the held-out loss is {total}, a finite one is needed: lower --lr, or use --precision fp32")
    return correct.double().mean().item(), total / weight
