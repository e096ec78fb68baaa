"""An endless supply of graph-search examples in natural language, harder from stage to stage.

Example i of a stage is a function of (seed, purpose, stage, i) alone: whoever makes it, in whatever batch, makes the same.

    examples = SyntheticExamples(Task(max_input_size=96, max_lookahead=16), seed=0, stage=3)
    next(iter(examples))        # {"prompt": "Suppose we have ...", "answer": " obar", "output_texts": ["obar"], ...}
    examples.texts(1000, 2)     # examples 1000 and 1001
    examples.stage = 4          # what comes next is harder
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from lm.external_generator import ExternalGenerator
from lm.graph_search import Task, draw_graphs
from lm.graph_text import Written, prompt_digest, write
from lm.graph_tokens import Encoder, Tokenised, check_tokenizer

__all__ = ["SyntheticExamples", "Task", "Tokenised", "check_tokenizer", "prompt_digest", "share_too_long"]

MAX_ATTEMPTS = 500  # at one example, before giving up
AT_ONCE = 128  # examples drawn together: fewer cost more calls, more leave the processor's cache
AHEAD = 32  # examples that iteration makes before handing out the first of them


class BuiltIn:
    """Examples of lm.graph_search in the words of lm.graph_text."""

    def __init__(self, task: Task, seed: int, purpose: str):
        self._task, self._seed, self._purpose = task, seed, purpose

    def draw(self, stage: int, attempt: int, indices: np.ndarray) -> tuple[np.ndarray, Written]:
        """The examples with these indices: every attempt gives them all."""
        return indices, write(draw_graphs(self._task, self._seed, stage, indices, self._purpose, attempt))


class SyntheticExamples(torch.utils.data.Dataset):
    """Examples 0, 1, 2, ... of a stage, made when they are asked for.

    An attempt at an example whose prompt is reserved, or which is longer than `seq_len`, is refused and drawn anew.

    Args:
        task: sizes of the largest graphs.
        seed: with purpose, stage and index, decides an example.
        stage: 1 .. task.max_lookahead; may be set at any time, and holds for what is asked for after that.
        purpose: a name, so that training and evaluation draw other examples.
        reserved: digests (`prompt_digest`) of prompts that never come out.
        generator: "module:Class" of a published generator to take instead of the built-in one.
        tokenizer: needed for `examples` and for `seq_len`; or an Encoder, which takes half a second to make of a large one.
        seq_len: the most tokens of prompt, answer and end of sequence together; None sets no limit.

    Raises: ValueError, all faults of the arguments together, or as lm.graph_tokens.Encoder does.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        stage: int = 1,
        purpose: str = "train",
        reserved: frozenset[bytes] = frozenset(),
        generator: str | None = None,
        tokenizer: PreTrainedTokenizerFast | Encoder | None = None,
        seq_len: int | None = None,
    ):
        faults = task.faults()
        if seq_len is not None and tokenizer is None:
            faults.append(f"seq_len {seq_len} without a tokenizer, one is needed to count tokens: pass tokenizer")
        if faults:
            raise ValueError("\n".join(faults))
        self.task = task
        self.seed = seed
        self.stage = stage
        self.reserved = reserved
        self.seq_len = seq_len
        self.current_index = 0  # how many examples iteration has handed out
        self._source = ExternalGenerator(generator, task, seed, purpose) if generator else BuiltIn(task, seed, purpose)
        self._encoder = tokenizer if tokenizer is None or isinstance(tokenizer, Encoder) else Encoder(tokenizer)

    @property
    def stage(self) -> int:
        """The stage of the curriculum, 1 .. task.max_lookahead."""
        return self._stage

    @stage.setter
    def stage(self, stage: int) -> None:
        self.task.limits(stage)  # raises if there is no such stage
        self._stage = stage

    @property
    def alpha(self) -> float:
        """The stage as a share of the last one."""
        return self.stage / self.task.max_lookahead

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Examples from `current_index` on, without end; a change of stage or of `current_index` holds from the next one."""
        while True:
            stage = self.stage
            for example in self.texts(self.current_index, AHEAD):
                if (self.stage, self.current_index) != (stage, example["index"]):
                    break
                self.current_index += 1
                yield example

    def texts(self, start: int, count: int) -> list[dict[str, Any]]:
        """Examples start .. start + count - 1 in words.

        Each has prompt, answer (with the space before it), output_texts (all right answers, this one first), alpha, stage
        and index.
        """
        drawn, _ = self._draw(start, count, as_ids=False)
        return [
            {
                "prompt": prompt,
                "answer": f" {answers[0]}",
                "output_texts": answers,
                "alpha": self.alpha,
                "stage": self.stage,
                "index": index,
            }
            for index, (prompt, answers) in enumerate(drawn, start)
        ]

    def examples(self, start: int, count: int) -> Tokenised:
        """Examples start .. start + count - 1 as token ids, the same as `texts` gives in words."""
        if self._encoder is None:
            raise ValueError("examples() without a tokenizer, one is needed for ids: pass tokenizer, or ask for texts()")
        drawn, num_too_long = self._draw(start, count, as_ids=True)
        answer_tokens = np.array([tokens for _, tokens in drawn], dtype=np.int64)
        return Tokenised([ids for ids, _ in drawn], answer_tokens, num_too_long)

    def _draw(self, start: int, count: int, as_ids: bool) -> tuple[list[tuple], int]:
        """Each example as (ids, answer tokens) or (prompt, answers), and how many attempts were too long."""
        drawn: list[tuple] = []
        num_too_long = 0
        for first in range(start, start + count, AT_ONCE):
            indices = np.arange(first, min(first + AT_ONCE, start + count))
            found, too_long = self._first_acceptable(indices, as_ids)
            drawn += [found[index] for index in indices.tolist()]
            num_too_long += too_long
        return drawn, num_too_long

    def _first_acceptable(self, indices: np.ndarray, as_ids: bool) -> tuple[dict[int, tuple], int]:
        """The same by index, for as many as are drawn together."""
        found: dict[int, tuple] = {}
        num_failed = num_reserved = num_too_long = 0
        for attempt in range(MAX_ATTEMPTS):
            made, drawn = self._source.draw(self.stage, attempt, indices)
            prompts = drawn.prompts() if self.reserved or not as_ids else []
            ids, answer_tokens = self._encoder.encode(drawn) if as_ids or self.seq_len is not None else ([], [])
            reserved, too_long = np.zeros((2, len(made)), dtype=bool)
            if self.reserved:
                reserved[:] = [prompt_digest(prompt) in self.reserved for prompt in prompts]
            if self.seq_len is not None:
                too_long[:] = [len(row) > self.seq_len for row in ids]
            num_failed += len(indices) - len(made)
            num_reserved += int(reserved.sum())
            num_too_long += int(too_long.sum())
            items = zip(ids, answer_tokens, strict=True) if as_ids else zip(prompts, drawn.answers(), strict=True)
            fine = ~(reserved | too_long)
            found |= {i: item for i, item, keep in zip(made.tolist(), items, fine.tolist(), strict=True) if keep}
            indices = np.setdiff1d(indices, made[fine])
            if not len(indices):
                return found, num_too_long
        raise RuntimeError(
            f"no acceptable example {indices[0]} of stage {self.stage} in {MAX_ATTEMPTS} attempts: {num_failed} draws of its "
            f"batch gave nothing, {num_reserved} were reserved and {num_too_long} longer than --seq_len {self.seq_len}: "
            f"raise --seq_len, lower --max_lookahead, or reserve fewer prompts"
        )


def share_too_long(
    task: Task,
    stage: int,
    tokenizer: PreTrainedTokenizerFast | Encoder,
    seq_len: int,
    sample: int = 1000,
    generator: str | None = None,
) -> tuple[float, int]:
    """The share of a stage's examples that are longer than `seq_len` tokens, and the longest length, in a sample of them."""
    examples = SyntheticExamples(task, 0, stage, "lengths", generator=generator, tokenizer=tokenizer)
    lengths = np.array([len(ids) for ids in examples.examples(0, sample).ids])
    return float(np.mean(lengths > seq_len)), int(lengths.max())
