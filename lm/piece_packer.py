"""Packing one piece of a corpus into shards, in a process of its own, so that a kill costs one shard at most.

FOLDER/partial/00012/0003.bin and .json are the fourth shard of piece 12 and what is known of it; the .json is written last. A
shard begins where the one before ended, so its bytes depend on the piece alone, not on who packs it and how often it is killed.
No transformers and no torch here: every worker imports this.
"""

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.checks import refuse
from lm.corpus import HUB
from lm.documents import EMPTY, Document, Piece, Reading, documents, where
from lm.files import locked, read_sealed, whole_file, write_sealed
from lm.shards import MADE_BY, entry_faults
from lm.sources import disk_full
from lm.text_encoder import TextEncoder

BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 2**20  # encoded at once: whichever is reached first
COMPARED_FIRST, COMPARED_EVERY = 4, 500  # documents of a piece that both encoders encode
PLACES = 5  # of left out documents that a shard remembers
ATTEMPTS = 5  # at a piece that lies on the hub


@dataclass(frozen=True)
class Job:
    """What a worker needs to know."""

    partial: Path  # OUTPUT_DIR/partial
    reading: Reading
    tokenizer_json: str
    vocab_size: int
    eos_token_id: int
    dtype: np.dtype
    shard_tokens: int  # a shard ends with the batch that reaches so many
    compare_all: bool
    skip_bad_documents: bool


class Stopped(Exception):
    """Enough is packed; the shard that was being written is thrown away."""


class PiecePacker:
    """One worker: its encoder, and the counters that it shares with the others.

    Args:
        done: shared array of tokens and documents encoded, for the display.
        stop: shared value; once it is not 0, `pack` raises Stopped at the next batch.
    """

    def __init__(self, job: Job, done: Any, stop: Any):
        self.job, self.done, self.stop = job, done, stop
        self.encoder = TextEncoder(job.tokenizer_json)

    def pack(self, piece: Piece, number: int, shard: int, record: int) -> None:
        """Write the shards of `piece`, the `number`th, that are not there yet; its shard `shard` begins at record `record`.

        Raises: RuntimeError if another process is packing the piece; ValueError for a document that is none; Stopped.
        """
        folder = self.job.partial / f"{number:05d}"
        for attempt in itertools.count(1):
            try:
                with locked(folder / "lock", f"packing {folder}"):
                    return self._pack(piece, number, folder, shard, record)
            except Exception as error:
                ours = isinstance(error, ValueError | RuntimeError | Stopped) or disk_full(error)
                if ours or attempt == ATTEMPTS or not piece.files[0].startswith(HUB):
                    raise
                print(f"{piece.files[0]}: {type(error).__name__}: {error}; trying again", flush=True)
                time.sleep(2**attempt)

    def pack_first(self, piece: Piece, path: Path) -> dict[str, Any]:
        """Write the first documents of a piece, as many as fill one shard, and return what is known of it."""
        batches = _batches(documents(piece, 0, self.job.reading), 1)
        with whole_file(path) as partial, open(partial, "wb") as file:
            return self._write_shard(piece, file, 0, next(batches, []), batches)[0]

    def _pack(self, piece: Piece, number: int, folder: Path, shard: int, record: int) -> None:
        while (entry := finished(folder, shard)) is not None:
            if entry["last"]:
                return
            shard, record = shard + 1, entry["records"][1]
        batches = _batches(documents(piece, number, self.job.reading, skip=record), BATCH_DOCUMENTS)
        batch, last = next(batches, []), False
        while not last:
            with whole_file(folder / f"{shard:04d}.bin") as partial, open(partial, "wb") as file:
                entry, batch = self._write_shard(piece, file, record, batch, batches)
            write_sealed(folder / f"{shard:04d}.json", {"shard": entry})
            shard, record, last = shard + 1, entry["records"][1], entry["last"]

    def _write_shard(
        self, piece: Piece, file: Any, record: int, batch: list[Document], batches: Iterator[list[Document]]
    ) -> tuple[dict[str, Any], list[Document]]:
        """One shard from `batch` on: what is known of it, and the batch after it. Raises: Stopped when told to."""
        shard, checksum, end = {"tokens": 0, "documents": 0, "compared": 0, "differing": 0}, hashlib.sha256(), record
        shard |= {"left_out": Counter(), "left_out_at": []}
        while batch and shard["tokens"] < self.job.shard_tokens:
            if self.stop.value:
                raise Stopped
            texts, compare = self._texts(piece, batch, end, shard)
            ids = self._encode(texts, compare, shard)
            data = ids.tobytes()
            file.write(data)
            checksum.update(data)
            with self.done.get_lock():
                self.done[0] += len(ids)
                self.done[1] += len(texts)
            end += len(batch)
            batch = next(batches, [])
        facts = {"records": [record, end], "last": not batch, "sha256": checksum.hexdigest(), "encoder": self.encoder.name}
        return shard | facts, batch

    def _texts(self, piece: Piece, batch: list[Document], first: int, shard: dict[str, Any]) -> tuple[list[str], list[int]]:
        """The texts of a batch, and which of them are to be compared; what is none is counted, or raised."""
        texts, compare = [], []
        for at, document in enumerate(batch, first):
            if document.fault is None:
                if self.job.compare_all or at < COMPARED_FIRST or at % COMPARED_EVERY == 0:
                    compare.append(len(texts))
                texts.append(document.text)
                continue
            if document.fault != EMPTY and not self.job.skip_bad_documents:
                raise ValueError(
                    f"{where(piece, document)} is no document: {document.fault}; mend it, or pass --skip_bad_documents to leave"
                    " out all such and count them"
                )
            shard["left_out"][document.fault.partition(" (")[0]] += 1
            if document.fault != EMPTY and len(shard["left_out_at"]) < PLACES:
                shard["left_out_at"].append(f"{where(piece, document)}: {document.fault}")
        return texts, compare

    def _encode(self, texts: list[str], compare: list[int], shard: dict[str, Any]) -> np.ndarray:
        """The ids of the texts, EOS after each, in the dtype of the shards."""
        encoded = self.encoder.encode(texts, compare)
        if len(encoded.ids) and (largest := int(encoded.ids.max())) >= self.job.vocab_size:
            raise ValueError(f"the tokenizer gave id {largest}, it has {self.job.vocab_size} tokens: take another tokenizer")
        ids = np.insert(encoded.ids.astype(self.job.dtype), encoded.ends, self.job.eos_token_id)
        counts = {"tokens": len(ids), "documents": len(texts), "compared": encoded.num_compared}
        for key, count in (counts | {"differing": len(encoded.differing)}).items():
            shard[key] += count
        return ids


def finished(folder: Path, shard: int) -> dict[str, Any] | None:
    """What is known of a shard of a piece, if it is whole."""
    path = folder / f"{shard:04d}.json"
    if not path.exists():
        return None
    entry = read_sealed(path, MADE_BY).get("shard")
    refuse(entry_faults(str(path), entry), MADE_BY)
    return entry


def _batches(found: Iterator[Document], most: int) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in found:
        batch.append(document)
        size += len(document.text or "")
        if len(batch) == most or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
