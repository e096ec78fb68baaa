"""A pack: one long stream of token ids, every document followed by EOS, cut into shards on the disk and read in blocks.

Block b is tokens b * seq_len to (b + 1) * seq_len of the stream, both included: seq_len + 1 tokens, whose first is the last of
the block before. So every token but the stream's first is a target exactly once, also where two shards meet.
With --no_overlap ("overlap": false in the header) it is tokens b * (seq_len + 1) to b * (seq_len + 1) + seq_len: no token is in
two blocks, and the first of each block is never a target.

shard_00000.bin ...   flat little-endian uint16 (uint32 for a vocabulary above 65,536), whole documents
held_out.bin          the same, documents that are in no shard
tokenizer/            the tokenizer that made the ids
progress.json         the shards so far, while build_pretrain.py goes on; a trainer may begin
meta.json             all of them, once it has finished; both also have size and SHA-256 of the tokenizer's files
"""

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lm.checks import COUNT, Kinds, count_faults, file_faults, kind_faults, list_faults, refuse, size_fault
from lm.files import read_sealed, sha256
from lm.papers import DTYPES, header_faults

FORMAT = "shards-2"
MADE_BY = "build_pretrain.py"
HEADER: Kinds = {"seq_len": range(1, 2**31), "dtype": str, "vocab_size": range(1, 2**32 + 1), "eos_token_id": range(2**32)}
HEADER |= {"tokenizer": dict, "source": dict}
COUNTS = ("tokens", "documents", "compared", "differing")
ENTRY: Kinds = dict.fromkeys(COUNTS, COUNT) | {"sha256": str, "records": list, "last": bool, "encoder": str}
ENTRY |= {"left_out": dict, "left_out_at": list}  # what is known of a shard
STATE: Kinds = {"header": dict, "shards": list, "held_out": dict, "files": dict, "next": dict}
NEXT: Kinds = {"piece": COUNT, "shard": COUNT, "record": COUNT}


class Pack:
    """A pack opened for reading; what its files say is checked when it is opened, their bytes when they are first read.

    Args:
        folder: what build_pretrain.py made, or is making.
        seq_len: the run's; None takes the pack's.

    Raises: FileNotFoundError if there is none, finished or begun; ValueError naming the file that is wrong.
    """

    def __init__(self, folder: Path | str, seq_len: int | None = None):
        self.folder = Path(folder)
        state, self.finished = _read_state(self.folder)
        self.header: dict[str, Any] = state["header"]
        self.seq_len, self.dtype = self.header["seq_len"], DTYPES[self.header["dtype"]]
        self.stride = stride(self.header)
        if seq_len not in (None, self.seq_len):
            raise ValueError(
                f"--seq_len {seq_len}, but {folder} has blocks of {self.seq_len} + 1 tokens: pass --seq_len {self.seq_len},"
                f" or pack again ({MADE_BY} --seq_len {seq_len} --output_dir ANOTHER)"
            )
        self.target_blocks: int | None = state["target_blocks"]
        self.held_out: dict[str, Any] = state["held_out"]
        self._open: dict[str, np.ndarray] = {}
        self.shards: list[dict[str, Any]] = []
        _check_sizes(self.folder, [self.held_out], self.dtype)
        refuse(file_faults(self.folder, state["files"]), MADE_BY)
        self.take(state["shards"], self.finished)

    @property
    def identity(self) -> str:
        """A SHA-256 of all that decides the stream, finished or not; a longer pack of the same begins with the same tokens."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()

    @property
    def num_blocks(self) -> int:
        """Whole blocks in the shards so far."""
        return blocks_in(self.num_tokens, self.header)

    def take(self, shards: list[dict[str, Any]], finished: bool) -> None:
        """Know these shards, of which the first are those known before (another process has read them)."""
        _check_sizes(self.folder, shards[len(self.shards) :], self.dtype)
        self.shards, self.finished = shards, finished
        self._ends = list(accumulate(shard["tokens"] for shard in shards))
        self.num_tokens = self._ends[-1] if shards else 0

    def refresh(self) -> None:
        """Look which shards have come since. Raises: ValueError if the folder holds another pack now."""
        state, finished = _read_state(self.folder)
        if state["header"] != self.header or state["shards"][: len(self.shards)] != self.shards:
            raise ValueError(f"{self.folder} was packed anew while it was read: pass another --output_dir, or start again")
        self.take(state["shards"], finished)

    def blocks(self, numbers: Sequence[int]) -> np.ndarray:
        """These blocks, (len(numbers), seq_len + 1) in the pack's dtype.

        Raises: ValueError naming the shard if its bytes are not those that were written.
        """
        out = np.empty((len(numbers), self.seq_len + 1), self.dtype)
        for row, number in zip(out, numbers, strict=True):
            self._read(number * self.stride, row)
        return out

    def held_out_blocks(self) -> np.ndarray:
        """All blocks of held-out text, (number, seq_len + 1)."""
        tokens = self._tokens(self.held_out)
        number = blocks_in(len(tokens), self.header)
        if not number:
            return np.empty((0, self.seq_len + 1), self.dtype)
        starts = np.arange(number)[:, None] * self.stride
        return tokens[starts + np.arange(self.seq_len + 1)]

    def where(self, number: int) -> str:
        """The shard in which a block begins, and its first token there."""
        shard = bisect.bisect_right(self._ends, number * self.stride)
        first = number * self.stride - (self._ends[shard - 1] if shard else 0)
        return f"{self.shards[shard]['file']} token {first}"

    def verify(self) -> None:
        """Compare the checksums of all files with what was written. Raises: ValueError naming the first that differs."""
        for entry in [*self.shards, self.held_out]:
            self._tokens(entry)

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with the stream's tokens from `start` on, over as many shards as it takes."""
        assert start + len(out) <= self.num_tokens, "the caller asks for blocks that there are"
        shard = bisect.bisect_right(self._ends, start)
        filled = 0
        while filled < len(out):
            tokens = self._tokens(self.shards[shard])
            first = start + filled - (self._ends[shard] - len(tokens))
            piece = tokens[first : first + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled, shard = filled + len(piece), shard + 1

    def _tokens(self, entry: dict[str, Any]) -> np.ndarray:
        """A shard, mapped from the disk; the first time, its checksum is compared with what was written."""
        name = entry["file"]
        if name not in self._open:
            path = self.folder / name
            if (found := sha256(path)) != entry["sha256"]:
                refuse([f"{path} has changed: its SHA-256 is {found}, {entry['sha256']:.80} was written"], MADE_BY)
            is_empty = not entry["tokens"]  # no file of no bytes can be mapped
            self._open[name] = np.empty(0, self.dtype) if is_empty else np.memmap(path, self.dtype, mode="r").view(np.ndarray)
        return self._open[name]


def read_state(folder: Path) -> tuple[dict[str, Any], bool] | None:
    """What meta.json says and True, else what progress.json says and False, else None."""
    for name, finished in (("meta.json", True), ("progress.json", False), ("meta.json", True)):  # it may finish as we look
        try:
            state = read_sealed(folder / name, MADE_BY, FORMAT)
        except FileNotFoundError:
            continue
        _check_state(folder / name, state, finished)
        return state, finished
    return None


def _read_state(folder: Path) -> tuple[dict[str, Any], bool]:
    found = read_state(folder)
    if found is None:
        raise FileNotFoundError(
            f"no {folder}/meta.json and no progress.json: run {MADE_BY}; a trainer may start on its first shard"
        )
    return found


def stride(header: dict[str, Any]) -> int:
    """Tokens from the beginning of a block to that of the next."""
    return header["seq_len"] + (1 if header.get("overlap") is False else 0)


def blocks_in(tokens: int, header: dict[str, Any]) -> int:
    """Whole blocks in the first `tokens` of a stream."""
    step = stride(header)
    return max(tokens - header["seq_len"] - 1 + step, 0) // step


def tokens_for(blocks: int, header: dict[str, Any]) -> int:
    """Tokens that so many blocks, at least one, take."""
    return (blocks - 1) * stride(header) + header["seq_len"] + 1


def totals(state: dict[str, Any]) -> dict[str, Any]:
    """What meta.json says of all shards together."""
    shards, header, left_out = state["shards"], state["header"], Counter()
    for shard in shards:
        left_out.update(shard["left_out"])
    sums = {f"num_{key}": sum(shard[key] for shard in shards) for key in COUNTS}
    tokens, num_blocks = sums["num_tokens"], blocks_in(sums["num_tokens"], header)
    rest = tokens - tokens_for(num_blocks, header) if num_blocks else tokens
    return sums | {"num_blocks": num_blocks, "left_out": dict(sorted(left_out.items())), "tokens_after_the_last_block": rest}


def _check_state(path: Path, state: dict[str, Any], finished: bool) -> None:
    """Raises: ValueError naming what in the file cannot be, or does not agree with the rest of it."""
    refuse(kind_faults(path, state, STATE), MADE_BY)
    header, shards, held_out = state["header"], state["shards"], state["held_out"]
    refuse(kind_faults(f"{path} header", header, HEADER), MADE_BY)
    faults = header_faults(path, header) + kind_faults(f"{path} next", state["next"], NEXT)
    if header.get("overlap", False) is not False:
        faults.append(f"{path} has overlap {header['overlap']!r:.80}, false is needed, or no such key")
    if header["eos_token_id"] >= header["vocab_size"]:
        faults.append(f"{path} has eos_token_id {header['eos_token_id']}, below vocab_size {header['vocab_size']} is needed")
    if state.get("target_blocks", 0) is not None:
        faults += kind_faults(path, state, {"target_blocks": range(1, COUNT.stop)})
    faults += list_faults(path, state["files"], ["tokenizer/tokenizer.json"])
    for number, shard in enumerate(shards):
        here = f"{path} shard {number}"
        faults += entry_faults(here, shard) or _place_faults(here, shard, f"shard_{number:05d}.bin", {"piece": COUNT})
    here = f"{path} held_out"
    faults += entry_faults(here, held_out) or _place_faults(here, held_out, "held_out.bin", {"first_record": COUNT})
    refuse(faults, MADE_BY)
    if finished:
        all_of_it = totals(state)
        if differ := [key for key in all_of_it if key not in state or state[key] != all_of_it[key]]:
            found = {key: state.get(key) for key in differ}
            refuse([f"{path} has {found!r:.200}, { ({key: all_of_it[key] for key in differ})!r:.200} are needed"], MADE_BY)


def entry_faults(where: str, entry: Any) -> list[str]:
    """A line for each thing in what is known of a shard that cannot be."""
    if faults := kind_faults(where, entry, ENTRY):
        return faults
    faults = count_faults(f"{where} left_out", entry["left_out"])
    if [type(record) for record in entry["records"]] != [int, int] or not 0 <= entry["records"][0] <= entry["records"][
        1
    ] < COUNT.stop:
        faults.append(f"{where} has records {entry['records']!r:.80}, the first and the one after the last are needed")
    if not all(isinstance(place, str) for place in entry["left_out_at"]):
        faults.append(f"{where} has left_out_at {entry['left_out_at']!r:.80}, strings are needed")
    if entry["documents"] > entry["tokens"]:
        faults.append(f"{where} has {entry['documents']} documents in {entry['tokens']} tokens, each has one at least")
    return faults


def _place_faults(where: str, entry: dict[str, Any], name: str, kinds: Kinds) -> list[str]:
    faults = kind_faults(where, entry, kinds)
    return faults if entry.get("file") == name else [*faults, f"{where} is {entry.get('file')!r:.80}, {name} is needed"]


def _check_sizes(folder: Path, shards: list[dict[str, Any]], dtype: np.dtype) -> None:
    """Every file has as many bytes as its tokens need."""
    found = (size_fault(folder, shard["file"], shard["tokens"] * dtype.itemsize) for shard in shards)
    refuse(filter(None, found), MADE_BY)
