"""Rows of a pretraining step: blocks of a pack in their order, and among them synthetic examples.

Sample i is the next synthetic example if the i-th uniform draw is below `share`, else the next block; row j of step s is
sample s * effective_batch + j. So what a sample is follows from (data, seed, i) alone, and so does how many came before it.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerFast

from lm import draws
from lm.heldout import HeldOut, encode_rows
from lm.ledger import Columns
from lm.packing import Batch, Loss, pack
from lm.shards import Pack
from lm.text_encoder import TextEncoder
from lm.tokenizer import encode_documents

CHUNK = 2**14  # samples counted at once
AT_ONCE = 1000  # synthetic examples tokenised together to learn their lengths
WORTH_LOADING = 2_000_000  # characters: those that Hugging Face's tokenizers encode while the faster one is loaded
_order = functools.lru_cache(maxsize=4)(draws.permutation)


class Mixture:
    """Which samples are synthetic: each with probability `share`, decided by `seed`."""

    def __init__(self, seed: int, share: float):
        self.seed, self.share = seed, share
        self._before = [0]  # synthetic samples before each chunk, as far as they have been counted

    def is_synthetic(self, samples: range) -> np.ndarray:
        """Whether each of these samples is synthetic, bool (len(samples),)."""
        first = samples.start // 4  # a draw has four numbers, one for each of four samples
        drawn = draws.uniforms(self.seed, "mixin", first, -(-samples.stop // 4) - first).ravel()
        return drawn[samples.start - 4 * first :][: len(samples)] < self.share

    def drawn(self, samples: int) -> tuple[int, int]:
        """How many of the first `samples` samples are blocks, and how many are synthetic."""
        chunk = samples // CHUNK
        for counted in range(len(self._before) - 1, chunk):
            among = self.is_synthetic(range(counted * CHUNK, (counted + 1) * CHUNK))
            self._before.append(self._before[-1] + int(among.sum()))
        synthetic = self._before[chunk] + int(self.is_synthetic(range(chunk * CHUNK, samples)).sum())
        return samples - synthetic, synthetic


class MixedRows(Mixture):
    """Samples 0, 1, 2, ... as rows of `pack.seq_len` targets.

    Args:
        pack: opened for reading; blocks are taken as they are asked for, so it may still grow.
        synthetic: examples (`input_text`, `output_texts`, the label first); needed unless `share` is 0. Each is taken once in
            a pass, in another order each time.
        tokenizer: that of the pack.
        seed: decides which samples are synthetic, and the orders.
        share: the probability that a sample is synthetic.
        loss: what of a synthetic row trains (see `lm.packing.pack`).
        shuffle: also the first pass takes the blocks in an order of the seed's; `pass_blocks` must be known then.
    """

    def __init__(
        self,
        pack: Pack,
        synthetic: Sequence[dict],
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        share: float,
        loss: Loss = "answer_only",
        shuffle: bool = False,
    ):
        super().__init__(seed, share)
        self.pack, self.synthetic, self.tokenizer, self.loss, self.shuffle = pack, synthetic, tokenizer, loss, shuffle

    def rows(self, samples: range, pass_blocks: int | None = None) -> Batch:
        """These samples, n rows of T = `pack.seq_len` targets, as `text_rows` gives them.

        A synthetic row is prompt, answer and EOS, padded on the right. Its weights are scaled to sum to T, so that the mean
        loss of every row counts the same.

        Args:
            pass_blocks: blocks in a pass over the pack; the first is in their order (unless `shuffle`), later ones each in
                another. None: the first never ends.
        """
        return self._rows(*self._what(samples, pass_blocks))

    def noted_rows(self, samples: range, pass_blocks: int | None = None) -> tuple[Batch, Columns]:
        """The same with what the ledger says of each row: its block, or the number of its synthetic example."""
        synthetic, blocks, numbers = self._what(samples, pass_blocks)
        block, mixin = np.full((2, len(samples)), -1)
        block[~synthetic], mixin[synthetic] = blocks, numbers
        return self._rows(synthetic, blocks, numbers), {"example": np.array(samples), "block": block, "mixin": mixin}

    def _rows(self, synthetic: np.ndarray, blocks: list[int], numbers: list[int]) -> Batch:
        ids = np.zeros((len(synthetic), self.pack.seq_len + 1), dtype=np.int64)
        ids[~synthetic] = self.pack.blocks(blocks)
        batch = text_rows(ids)
        batch["synthetic"] = torch.from_numpy(synthetic)
        if numbers:
            examples = self._encode(numbers)
            packed = pack(examples.examples, examples.answer_tokens, self.loss, reach=None)
            packed["weights"] *= self.pack.seq_len / packed["weights"].sum(dim=1, keepdim=True)
            width = packed["weights"].shape[1]
            batch["weights"] = torch.ones(batch["targets"].shape)
            batch["answer"] = torch.zeros(batch["targets"].shape, dtype=torch.bool)
            for name in ("input_ids", "targets", "weights", "answer"):
                batch[name][synthetic] = 0
                batch[name][synthetic, :width] = packed[name]
            batch["trained"] = batch["weights"].flatten().nonzero().flatten()
        return batch

    def sources(self, samples: range, pass_blocks: int | None = None) -> list[tuple]:
        """Where each sample comes from: ("c4", block, its shard and first token) or ("mixin", number of the example)."""
        synthetic, blocks, numbers = self._what(samples, pass_blocks)
        texts = iter([("c4", block, self.pack.where(block)) for block in blocks])
        examples = iter([("mixin", number) for number in numbers])
        return [next(examples if is_synthetic else texts) for is_synthetic in synthetic]

    def check_synthetic(self, file: Path, accelerator: Accelerator) -> None:
        """Raise ValueError, on every process, if `file` gave no synthetic example, or one that does not fit into a row.

        The processes share the work: of 50,000 long examples it would take Hugging Face's tokenizers a minute.
        """
        if not self.synthetic:
            raise ValueError(f"{file} is empty, examples are needed: build it with more, or pass --mixin_percent 0")
        own = range(accelerator.process_index, len(self.synthetic), accelerator.num_processes)
        count, too_long = self._counter(sum(len(self.synthetic[number]["input_text"]) for number in own)), []
        for numbers in (own[first : first + AT_ONCE] for first in range(0, len(own), AT_ONCE)):
            rows = [self.synthetic[number] for number in numbers]
            texts = [row["input_text"] for row in rows], [f" {row['output_texts'][0]}" for row in rows]
            prompts, answers = map(count, texts)
            lengths, fits = prompts + answers + 1, self.pack.seq_len + 1  # EOS
            too_long += [(int(length), n + 1) for length, n in zip(lengths, numbers, strict=True) if length > fits]
        if too_long := gather_object(too_long):
            length, line = max(too_long)
            raise ValueError(
                f"{len(too_long)} of the {len(self.synthetic)} rows of {file} do not fit into --seq_len {self.pack.seq_len}"
                f" (line {line} has {length} tokens): pack longer blocks, or build smaller examples"
            )

    def _counter(self, characters: int) -> Callable[[list[str]], np.ndarray]:
        """What counts the tokens of each text: the faster encoder, if there is more text than it takes time to load."""
        if characters < WORTH_LOADING:
            return lambda texts: np.array([len(ids) for ids in encode_documents(self.tokenizer, texts)])
        encoder = TextEncoder(self.tokenizer.backend_tokenizer.to_str())
        return lambda texts: np.diff(encoder.encode(texts).ends, prepend=0)

    def _encode(self, numbers: Sequence[int]) -> HeldOut:
        rows = [self.synthetic[number] for number in numbers]
        return encode_rows([{**row, "output_texts": row["output_texts"][:1]} for row in rows], self.tokenizer)

    def _what(self, samples: range, pass_blocks: int | None) -> tuple[np.ndarray, list[int], list[int]]:
        """Whether each sample is synthetic, the blocks of those that are not, and the examples of those that are."""
        synthetic = self.is_synthetic(samples)
        block, example = self.drawn(samples.start)
        count = int(synthetic.sum())
        blocks = [self.block(number, pass_blocks) for number in range(block, block + len(samples) - count)]
        return synthetic, blocks, [self._shuffled("mixin", example + n, len(self.synthetic)) for n in range(count)]

    def block(self, number: int, pass_blocks: int | None) -> int:
        """The block that is drawn as number `number`, from 0 on."""
        if pass_blocks is None or (number < pass_blocks and not self.shuffle):
            return number
        return self._shuffled("blocks", number, pass_blocks)

    def _shuffled(self, name: str, number: int, length: int) -> int:
        """Item `number` of 0 .. length - 1 over and over, each pass in an order of its own."""
        one_pass, item = divmod(number, length)
        return int(_order(self.seed, f"{name}/{one_pass}", length)[item])


def text_rows(blocks: np.ndarray) -> Batch:
    """Blocks (n, T + 1) as a micro-batch in which every target weighs 1.

    Returns:
        input_ids, targets: int64 (n, T). synthetic: bool (n,). Only where a row is synthetic also weights: float32 (n, T), 0
        where nothing is trained; answer: bool (n, T), at targets of a synthetic example's answer; trained: int64, the places of
        `weights` that are not 0, all rows in one.
    """
    ids = torch.from_numpy(blocks.astype(np.int64))
    targets = ids[:, 1:].contiguous()
    return {
        "input_ids": ids[:, :-1].contiguous(),
        "targets": targets,
        "synthetic": torch.zeros(len(ids), dtype=torch.bool),
    }


def row_ids(batch: Batch) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets of each row, with the padding of a synthetic one."""
    return zip(batch["input_ids"].numpy(), batch["targets"].numpy(), strict=True)
