"""Greedy continuations of many prompts: the most likely token, again and again, as transformers' `generate` finds it."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from lm.precision import autocast

TOKENS_IN_A_PASS = 2**14  # padding and continuations included: what their keys and values take in memory


def greedy(
    model: PreTrainedModel,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    end_id: int | None,
    micro_batch: int,
    precision: str = "fp32",
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """Yield, pass by pass, which prompts were continued, and the ids that follow each, up to `end_id`, which is cut off.

    The longest prompts come first, so that memory runs out at once or not at all. Runs on the model's device with dropout off.
    What the model's own generation_config.json asks for (sampling, penalties) does not count.

    Args:
        model: a Hugging Face causal language model; its `generation_config` is replaced.
        prompts: 1-D ids of each, not empty.
        new_tokens: ids that follow a prompt at most.
        end_id: the id that ends a continuation; None: nothing does.
        micro_batch: prompts in one pass at most; fewer where they would pass TOKENS_IN_A_PASS.
        precision: "fp32", or "bf16" or "fp16" for autocast.

    Raises: RuntimeError if the model gives logits that are not numbers.
    """
    filler = end_id or 0  # never looked at: before a prompt it is masked, after an end it is cut off
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=end_id, pad_token_id=filler
    )
    model.eval()
    for numbers in passes([len(prompt) for prompt in prompts], new_tokens, micro_batch):
        ids, mask = pad_left([prompts[number] for number in numbers], filler)
        new = _continue(model, ids, mask, precision)
        ends = [np.flatnonzero(row == end_id) for row in new]
        yield numbers, [row[: end[0]] if len(end) else row for row, end in zip(new, ends, strict=True)]


def passes(lengths: Sequence[int], new_tokens: int, micro_batch: int, most_tokens: int = TOKENS_IN_A_PASS) -> list[list[int]]:
    """Prompts for each pass, the longest first, those of one pass alike in length."""
    made: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not made or len(made[-1]) >= min(micro_batch, most_tokens // (lengths[made[-1][0]] + new_tokens)):
            made.append([])
        made[-1].append(number)
    return made


def pad_left(prompts: Sequence[np.ndarray], filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts that end together, as (n, longest) int64, and 1 where there is a prompt."""
    width = max(map(len, prompts))
    ids, mask = np.full((len(prompts), width), filler, dtype=np.int64), np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@torch.no_grad()
def _continue(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, precision: str) -> np.ndarray:
    """The ids that follow each row, filled up after an end."""
    device = model.device
    with autocast(device, precision):
        found = model.generate(ids.to(device), attention_mask=mask.to(device), return_dict_in_generate=True, output_logits=True)
    if any(logits.isnan().any() for logits in found.logits):
        raise RuntimeError("the model gives logits that are NaN: its weights are damaged, or try --precision fp32")
    return found.sequences[:, ids.shape[1] :].cpu().numpy()
