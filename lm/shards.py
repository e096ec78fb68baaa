"""A pack: one long stream of token ids, every document followed by EOS, cut into shards on the disk and read in blocks.

Block b is tokens b * seq_len to (b + 1) * seq_len of the stream, both included: seq_len + 1 tokens, whose first is the last of
the block before. So every token but the stream's first is a target exactly once, also where two shards meet.

shard_00000.bin ...   flat little-endian uint16 (uint32 for a vocabulary above 65,536), whole documents
held_out.bin          the same, documents that are in no shard
tokenizer/            the tokenizer that made the ids
progress.json         the shards so far, while build_pretrain.py goes on; a trainer may begin
meta.json             all of them, once it has finished
"""

import bisect
import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from lm.files import read_json, sha256

FORMAT = "shards-1"
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
MADE_BY = "build_pretrain.py"
HEADER = {"seq_len": int, "dtype": str, "vocab_size": int, "eos_token_id": int, "tokenizer": dict, "source": dict}
SHARD = {"file": str, "tokens": int, "documents": int, "sha256": str}


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
        self.take(state["shards"], self.finished)

    @property
    def identity(self) -> str:
        """A SHA-256 of all that decides the stream, finished or not; a longer pack of the same begins with the same tokens."""
        return hashlib.sha256(json.dumps(self.header, sort_keys=True).encode()).hexdigest()

    @property
    def num_blocks(self) -> int:
        """Whole blocks in the shards so far."""
        return max(self.num_tokens - 1, 0) // self.seq_len

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
            self._read(number * self.seq_len, row)
        return out

    def held_out_blocks(self) -> np.ndarray:
        """All blocks of held-out text, (number, seq_len + 1)."""
        tokens = self._tokens(self.held_out)
        number = max(len(tokens) - 1, 0) // self.seq_len
        starts = np.arange(number)[:, None] * self.seq_len
        return tokens[starts + np.arange(self.seq_len + 1)]

    def where(self, number: int) -> str:
        """The shard in which a block begins, and its first token there."""
        shard = bisect.bisect_right(self._ends, number * self.seq_len)
        first = number * self.seq_len - (self._ends[shard - 1] if shard else 0)
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
                raise _wrong(f"{path} has changed: its SHA-256 is {found}, {entry['sha256']} was written")
            self._open[name] = np.memmap(path, self.dtype, mode="r").view(np.ndarray) if entry["tokens"] else np.empty(0)
        return self._open[name]


def _wrong(found: str) -> ValueError:
    return ValueError(f"{found}: remove the folder and run {MADE_BY} again")


def read_state(folder: Path) -> tuple[dict[str, Any], bool] | None:
    """What meta.json says and True, else what progress.json says and False, else None."""
    for name, finished in (("meta.json", True), ("progress.json", False), ("meta.json", True)):  # it may finish as we look
        try:
            state = read_json(folder / name, MADE_BY)
        except FileNotFoundError:
            continue
        _check_state(folder / name, state)
        return state, finished
    return None


def _read_state(folder: Path) -> tuple[dict[str, Any], bool]:
    found = read_state(folder)
    if found is None:
        raise FileNotFoundError(
            f"no {folder}/meta.json and no progress.json: run {MADE_BY}; a trainer may start on its first shard"
        )
    return found


def _check_state(path: Path, state: Any) -> None:
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else state
        raise _wrong(f"{path} has format {found!r:.80}, {FORMAT!r} is needed")
    for key, kind in {"header": dict, "shards": list, "held_out": dict}.items():
        _check_kinds(path, state, {key: kind})
    _check_kinds(f"{path} header", state["header"], HEADER)
    if state["header"]["dtype"] not in DTYPES or state["header"]["seq_len"] < 1:
        raise _wrong(f"{path} has dtype {state['header']['dtype']!r:.80} and seq_len {state['header']['seq_len']}")
    for number, shard in enumerate([*state["shards"], state["held_out"]]):
        if not isinstance(shard, dict):
            raise _wrong(f"{path} shard {number} is {shard!r:.80}, an object is needed")
        _check_kinds(f"{path} shard {number}", shard, SHARD)
        name = f"shard_{number:05d}.bin" if number < len(state["shards"]) else "held_out.bin"
        if shard["file"] != name or shard["tokens"] < 0:
            raise _wrong(f"{path} shard {number} is {shard['file']!r:.80} of {shard['tokens']} tokens, {name} is needed")
    if "target_blocks" not in state or not isinstance(state["target_blocks"], int | None):
        raise _wrong(f"{path} has target_blocks {state.get('target_blocks')!r:.80}, an integer or null is needed")


def _check_kinds(where: object, found: dict, kinds: dict[str, type]) -> None:
    for key, kind in kinds.items():
        if type(found.get(key)) is not kind:  # bool is no int here
            raise _wrong(f"{where} has {key} {found.get(key)!r:.80}, {kind.__name__} is needed")


def _check_sizes(folder: Path, shards: list[dict[str, Any]], dtype: np.dtype) -> None:
    """Every file has as many bytes as its tokens need."""
    for shard in shards:
        path, needed = folder / shard["file"], shard["tokens"] * dtype.itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != needed:
            found = "is missing" if size is None else f"has {size} bytes"
            raise _wrong(f"{path} {found}, {needed} are needed for {shard['tokens']} tokens")
