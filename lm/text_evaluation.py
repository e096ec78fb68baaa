"""The loss of a language model on files of text, as a trainer's packs would hold them: documents joined, EOS after each."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from lm.characters import preparation
from lm.corpus import File
from lm.documents import EMPTY, Reading, cut, documents, where
from lm.files import read_json, write_json
from lm.measure import consecutive_windows, ratio_and_se, window_losses
from lm.tables import aligned
from lm.tokenizer import encode_documents

FORMAT = "text-1"
AT_ONCE = 64  # documents in one call of the tokenizer


def text_loss(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[File],
    seq_len: int,
    micro_batch: int,
    precision: str = "fp32",
    text_column: str = "text",
    done: Callable[[int], None] = lambda num_tokens: None,
) -> dict[str, float | int | None]:
    """The mean loss of every token of the files but the first, and what follows from it; the context starts anew each seq_len.

    Documents stand in the order of the files, EOS after each, with no attention mask between them, as in pretraining. Bytes and
    characters are those of the text as the tokenizer gets it (for one of characters after Unidecode), without EOS, whose loss
    counts: bits per byte are what it takes to write the documents down and to tell where each ends.

    Args:
        files: what lm/corpus.py finds; each document as build_pretrain.py reads it, empty ones left out.
        done: is told how many targets were measured since the last time.
    Returns: loss (nats per token), loss_se (between windows; None for one), perplexity, bits_per_byte, bits_per_char,
        num_tokens (targets), num_documents, num_bytes, num_chars.
    Raises: ValueError naming a document that is none, or if there are fewer than two tokens; RuntimeError if a loss is not
        finite.
    """
    counts = {"num_documents": 0, "num_bytes": 0, "num_chars": 0}
    sums, sizes = [], []
    for stretch in _stretches(_ids(tokenizer, files, text_column, counts), seq_len, 8 * micro_batch):
        windows, targets = consecutive_windows(stretch, seq_len)
        losses = window_losses(model, windows, micro_batch, precision)
        losses[np.arange(seq_len) >= targets[:, None]] = 0.0
        sums.append(losses.sum(axis=1))
        sizes.append(targets)
        done(int(targets.sum()))
    if not sums:
        raise ValueError(f"{', '.join(file.name for file in files)}: fewer than two tokens, pass files with text")
    return _record(np.concatenate(sums), np.concatenate(sizes), counts)


def _ids(
    tokenizer: PreTrainedTokenizerFast, files: Sequence[File], column: str, counts: dict[str, int]
) -> Iterator[np.ndarray]:
    """The ids of some documents at a time, EOS after each; what was read is added to `counts`."""
    held: list[str] = []
    for text in _texts(files, Reading(text_column=column, shuffle_window=0, prepare=preparation(tokenizer))):
        held.append(text)
        if len(held) == AT_ONCE:
            yield _joined(tokenizer, held, counts)
            held = []
    if held:
        yield _joined(tokenizer, held, counts)


def _joined(tokenizer: PreTrainedTokenizerFast, texts: list[str], counts: dict[str, int]) -> np.ndarray:
    counts["num_documents"] += len(texts)
    counts["num_bytes"] += sum(len(text.encode()) for text in texts)
    counts["num_chars"] += sum(map(len, texts))
    end = np.array([tokenizer.eos_token_id])
    return np.concatenate([part for ids in encode_documents(tokenizer, texts) for part in (ids.astype(np.int64), end)])


def _texts(files: Sequence[File], reading: Reading) -> Iterator[str]:
    for number, piece in enumerate(cut(files, reading)):
        for document in documents(piece, number, reading):
            if document.text is not None:
                yield document.text
            elif document.fault != EMPTY:
                raise ValueError(f"{where(piece, document)}: {document.fault}, a document is needed: mend it, or leave it out")


def _stretches(parts: Iterator[np.ndarray], seq_len: int, num_windows: int) -> Iterator[np.ndarray]:
    """One stream of ids in stretches of whole windows, the last token of one the first of the next."""
    length, held = num_windows * seq_len, np.empty(0, np.int64)
    for part in parts:
        held = np.concatenate([held, part])
        while len(held) > length:
            yield held[: length + 1]
            held = held[length:]
    if len(held) > 1:
        yield held


def _record(sums: np.ndarray, sizes: np.ndarray, counts: dict[str, int]) -> dict[str, float | int | None]:
    loss, se = map(float, ratio_and_se(sums, sizes))
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss}, a finite one is needed: the weights are damaged, or try --precision fp32")
    bits = float(sums.sum()) / math.log(2)
    return {
        "loss": loss,
        "loss_se": None if math.isnan(se) else se,
        "perplexity": math.exp(loss),
        "bits_per_byte": bits / counts["num_bytes"],
        "bits_per_char": bits / counts["num_chars"],
        "num_tokens": int(sizes.sum()),
        **counts,
    }


def text_table(record: dict) -> str:
    """The loss and what follows from it, for the screen."""
    se = "" if record["loss_se"] is None else f" ± {record['loss_se']:.4f}"
    header = ("documents", "tokens", "loss (nats/token)", "perplexity", "bits/byte", "bits/character")
    loss, per = f"{record['loss']:.4f}{se}", [f"{record[name]:.4f}" for name in ("bits_per_byte", "bits_per_char")]
    counts = [f"{record[name]:,}" for name in ("num_documents", "num_tokens")]
    return aligned([header, (*counts, loss, f"{record['perplexity']:.2f}", *per)])


def write_text(path: Path, record: dict) -> None:
    """Write what `text_loss` found and what it is of."""
    write_json(path, {"format": FORMAT, **record})


def read_text(path: Path) -> dict:
    """The record that `evaluate_model.py text` wrote. Raises: FileNotFoundError; ValueError if it is of another format."""
    record = read_json(path, "evaluate_model.py text")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not in format {FORMAT}: run evaluate_model.py text --overwrite")
    return record
