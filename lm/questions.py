"""Held-out questions of graph search: what is asked, what is right, how hard it is, and what a model has room for."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from lm.files import sha256
from lm.graph_text import describe
from lm.models import is_rotary
from lm.splits import SETS, check_files, read_meta, read_rows
from lm.tokenizer import encode_documents

NEW_TOKENS = 8  # that a model may answer with, unless a valid answer needs more


@dataclass(frozen=True)
class Question:
    """One row of a split."""

    index: int  # of the row
    prompt: str
    answers: list[str]  # all that are right
    lookahead: int | None  # None: not worded like ours
    chance: float | None  # that a random child of the current vertex is right


def read_questions(folder: Path, split: str, max_examples: int | None = None) -> tuple[list[Question], str]:
    """The first `max_examples` rows of a split (None: all), and the SHA-256 of its file.

    Raises: FileNotFoundError if there is nothing; ValueError if there is no such split, or it is damaged, or an answer is not
        one word.
    """
    if split not in SETS:
        raise ValueError(f"--split {split} is none of {', '.join(SETS)}: pass one of these")
    meta, name = read_meta(folder), f"{split}.jsonl"
    check_files(folder, {name: meta["files"][name]})
    rows = read_rows(folder, split, meta)[:max_examples]
    for line, row in enumerate(rows, 1):
        if wrong := [answer for answer in row["output_texts"] if first_word(answer) != answer]:
            raise ValueError(f"{folder / name} line {line} has the answer {wrong[0]!r}, one word is needed: use other data")
    return [question(index, row["input_text"], row["output_texts"]) for index, row in enumerate(rows)], sha256(folder / name)


def question(index: int, prompt: str, answers: list[str]) -> Question:
    """A row, with what its prompt says about how hard it is."""
    try:
        lookahead, children = describe(prompt, answers)
    except ValueError:
        return Question(index, prompt, answers, None, None)
    return Question(index, prompt, answers, lookahead, len(set(answers)) / children)


def first_word(continuation: str) -> str:
    """What a model answers: the text up to the first '.', ',' or white space."""
    return re.split(r"[.,\s]", continuation.lstrip(), maxsplit=1)[0]


@dataclass(frozen=True)
class Exam:
    """The questions that are asked, as ids."""

    questions: list[Question]
    prompts: list[np.ndarray]
    new_tokens: int  # that the model may answer with
    num_too_long: int  # questions left out, for they do not fit


def set_exam(
    questions: list[Question], tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, seq_len: int | None
) -> Exam:
    """Leave out what is longer than the run trained on (`seq_len`), answer and end included, or than the model has positions.

    Raises: ValueError if the model has not all the ids, or nothing is left.
    """
    prompts = encode_documents(tokenizer, [asked.prompt for asked in questions])
    words = iter(encode_documents(tokenizer, [f" {word}" for asked in questions for word in asked.answers]))
    answer_tokens = [max(len(next(words)) for _ in asked.answers) + 1 for asked in questions]  # with the end
    new_tokens = max(NEW_TOKENS, *answer_tokens)
    if new_tokens > NEW_TOKENS:
        print(f"the longest valid answer has {new_tokens - 1} tokens: the model goes on for {new_tokens}, not {NEW_TOKENS}")
    room = np.inf if seq_len is None else seq_len
    positions = np.inf if is_rotary(config) else getattr(config, "max_position_embeddings", None) or np.inf
    fits = [
        len(prompt) + tokens <= room and len(prompt) + new_tokens - 1 <= positions  # what comes last is never read
        for prompt, tokens in zip(prompts, answer_tokens, strict=True)
    ]
    if not any(fits):
        shortest = min(map(len, prompts))
        raise ValueError(
            f"all {len(prompts)} prompts are too long ({shortest} tokens or more) for --seq_len {seq_len} of the run and"
            f" {positions} positions of the model: use data of a smaller --max_input_size"
        )
    if (largest := max(int(prompt.max()) for prompt in prompts)) >= config.vocab_size:
        raise ValueError(
            f"the model has a vocabulary of {config.vocab_size}, the tokenizer gives id {largest}: pass the model's --tokenizer"
        )
    kept = np.flatnonzero(fits).tolist()
    return Exam([questions[i] for i in kept], [prompts[i] for i in kept], new_tokens, len(questions) - len(kept))
