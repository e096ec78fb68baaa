"""Our models as lm-eval takes them: the log-likelihood of a continuation given a context. Takes seconds to import."""

import contextlib
import io
import itertools
import logging
import sys
from collections.abc import Iterator

import datasets
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lm.characters import prepare_text
from lm.precision import DTYPES

MAX_LOGITS = 2**28  # in one forward pass: 1 GiB in float32


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """lm-eval and datasets write nothing to the screen; their errors are exceptions."""
    before, bars = logging.root.manager.disable, datasets.are_progress_bars_disabled()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
        if not bars:
            datasets.enable_progress_bars()


class Scorer(HFLM):
    """One of our models as lm-eval takes it, with what it needs beyond that.

    Texts are prepared as the tokenizer asks. Batches are bounded by their logits. A continuation longer than the context that
    the model takes is scored half of that at a time, each half after all that fits before it, where lm-eval would end with an
    AssertionError. What is cut off at the left is noted. An empty context is BOS or, where there is none, EOS, after which
    documents begin. Ids beyond the tokenizer's have their share of probability: the model was trained to give them none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        micro_batch: int,
        precision: str,
        bar: tqdm,
    ):
        dtype = None if DTYPES[precision] == torch.float32 else DTYPES[precision]
        with quiet():
            super().__init__(
                model, tokenizer=tokenizer, max_length=max_length, mixed_precision_dtype=dtype, softmax_dtype=torch.float32
            )
        self._micro_batch, self._bar, self._num_done = micro_batch, bar, 0
        self.num_tokens: dict[tuple[str, str], int] = {}  # of each continuation
        self.cut: set[tuple[str, str]] = set()  # requests of which the model saw less than all

    def tok_encode(self, string: str, *args, **kwargs) -> list[int]:
        return super().tok_encode(prepare_text(self.tokenizer, string), *args, **kwargs)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        self.batch_size_per_gpu = sys.maxsize  # all windows come at once, and `_batches` makes batches of them
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, override_bs: int | None = None):
        pieces, owners = [], []
        for number, (key, context, continuation) in enumerate(requests):
            self.num_tokens[key] = len(continuation)
            if len(context) + len(continuation) > self.max_length + 1:
                self.cut.add(key)
            step = len(continuation) if len(continuation) <= self.max_length else max(1, self.max_length // 2)
            for start in range(0, len(continuation), step):
                pieces.append((key, context + continuation[:start], continuation[start : start + step]))
                owners.append(number)
        self._bar.total = (self._bar.total or 0) + len(pieces)
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        for numbers in self._batches(pieces):
            answers = super()._loglikelihood_tokens([pieces[number] for number in numbers], disable_tqdm=True)
            for number, (log_likelihood, is_greedy) in zip(numbers, answers, strict=True):
                totals[owners[number]] += log_likelihood
                greedy[owners[number]] &= is_greedy
        return list(zip(totals, greedy, strict=True))

    def _batches(self, pieces) -> Iterator[list[int]]:
        """Pieces of similar length (longest first), with the batch size that their logits allow."""
        lengths = [min(len(context) + len(continuation), self.max_length) for _, context, continuation in pieces]
        order = sorted(range(len(pieces)), key=lambda number: -lengths[number])
        for _, group in itertools.groupby(order, key=lambda number: lengths[number].bit_length()):
            numbers = list(group)
            logits = lengths[numbers[0]] * self.model.config.vocab_size
            self.batch_size_per_gpu = max(1, min(self._micro_batch, MAX_LOGITS // logits))
            yield numbers
            self._num_done += len(numbers)
            self._bar.update(self._num_done - self._bar.n)  # some share a forward pass

    def _model_call(self, inps: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        self._bar.update(len(inps))
        return super()._model_call(inps, *args, **kwargs)
