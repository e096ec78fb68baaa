"""Graph-search examples as token ids, made from the ids of their pieces where the tokenizer allows it.

Fixed pieces and names are tokenised once; the adjectives of a batch with one call. That gives the tokenizer's own ids
when its pre-tokeniser never joins a word with what stands before its space, as in GPT-2's and its followers; for others,
found out on a sample when the encoder is made, whole texts are encoded.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from lm.characters import preparation
from lm.external_generator import Texts
from lm.graph_search import Task, draw_graphs
from lm.graph_text import END, FIXED_PIECES, Pieces, Written, write
from lm.tokenizer import encode_documents

_SAMPLE = Task(max_input_size=96, max_lookahead=16)
_SAMPLES_OF_A_STAGE = 48


class Tokenised(NamedTuple):
    """Examples as ids: prompt, answer, end of sequence. What is left of an example without its answer is its prompt."""

    ids: list[np.ndarray]  # 1-D int32
    answer_tokens: np.ndarray  # int64: how many of each example's last ids are the answer and the end of sequence
    num_too_long: int  # examples drawn and refused on the way, being longer than seq_len


def check_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError unless an answer has the same ids after its prompt as alone, and there is an end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token, an answer needs one to end: take another tokenizer")
    if asked := preparation(tokenizer):
        raise ValueError(
            f"the tokenizer needs texts prepared by {asked!r}, which would change the names of the graphs: take a"
            " byte-level BPE tokenizer"
        )
    for written in _samples():
        for prompt, (answer, *_) in zip(written.prompts(), written.answers(), strict=True):
            whole, first, second = encode_documents(tokenizer, [f"{prompt} {answer}", prompt, f" {answer}"])
            if whole.tolist() != [*first, *second]:
                raise ValueError(
                    f"the tokenizer splits the answer differently after a space: ' {answer}' is "
                    f"{tokenizer.convert_ids_to_tokens(second)} alone, after its prompt the text ends in "
                    f"{tokenizer.convert_ids_to_tokens(whole[-len(second) - 1 :])}: take a byte-level BPE tokenizer"
                )


def _samples() -> list[Written]:
    indices = np.arange(_SAMPLES_OF_A_STAGE)
    stages = (1, _SAMPLE.max_lookahead // 2, _SAMPLE.max_lookahead)
    return [write(draw_graphs(_SAMPLE, 0, stage, indices, "tokenizer check")) for stage in stages]


class Encoder:
    """Turns examples into ids. Says so, in one line, if the tokenizer needs whole texts.

    Raises: ValueError as `check_tokenizer` does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        check_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self._end = np.array([tokenizer.eos_token_id], dtype=np.int32)
        encoded = encode_documents(tokenizer, FIXED_PIECES)
        self._fixed = Pieces.of(
            [self._end if piece == END else ids.astype(np.int32) for piece, ids in zip(FIXED_PIECES, encoded, strict=True)]
        )
        self._begins_word = np.zeros(len(tokenizer), dtype=bool)
        self._begins_word[[number for token, number in tokenizer.get_vocab().items() if token.startswith(("Ġ", "▁"))]] = True
        self.by_pieces = all(map(self._pieces_agree, _samples()))
        if not self.by_pieces:
            print("the tokenizer joins tokens across words: examples are encoded as whole texts, which is slower", flush=True)

    def encode(self, examples: Written | Texts) -> tuple[list[np.ndarray], np.ndarray]:
        """The ids of each example, and how many of them are its answer and the end of sequence (int64)."""
        pieces = self._encode_pieces(examples) if self.by_pieces and isinstance(examples, Written) else None
        return pieces or self._encode_whole(examples)

    def _encode_whole(self, examples: Written | Texts) -> tuple[list[np.ndarray], np.ndarray]:
        answers = [f" {answers[0]}" for answers in examples.answers()]
        encoded = encode_documents(self.tokenizer, examples.prompts() + answers)
        pairs = list(zip(encoded[: len(answers)], encoded[len(answers) :], strict=True))
        ids = [np.concatenate([prompt, answer, self._end], dtype=np.int32) for prompt, answer in pairs]
        return ids, np.array([len(answer) + 1 for _, answer in pairs], dtype=np.int64)

    def _encode_pieces(self, written: Written) -> tuple[list[np.ndarray], np.ndarray] | None:
        """The same from the ids of the pieces; None if it is not clear where each adjective's begin."""
        (ids,) = encode_documents(self.tokenizer, [written.adjectives.data.tobytes().decode("ascii")])
        begins = np.append(np.flatnonzero(self._begins_word[ids]), len(ids))
        if len(begins) != len(written.adjectives.offsets):
            return None
        joined, offsets = written.join(self._fixed, Pieces(ids.astype(np.int32), begins))
        return [joined[begin:end] for begin, end in pairwise(offsets.tolist())], np.diff(begins)[written.answer_pieces] + 1

    def _pieces_agree(self, written: Written) -> bool:
        pieces, whole = self._encode_pieces(written), self._encode_whole(written)
        return pieces is not None and all(map(np.array_equal, pieces[0], whole[0])) and np.array_equal(pieces[1], whole[1])
