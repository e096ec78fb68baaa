"""Packing a corpus: pieces are dealt to worker processes, and their shards published in the order of the stream.

OUTPUT_DIR/partial/ holds what the workers have finished (lm/piece_packer.py); a shard moves up, and into progress.json, once
all before it are there. meta.json is written when enough are. What was published and what was finished stays after a kill.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from lm.documents import Piece
from lm.files import sync, write_sealed
from lm.piece_packer import Job, PiecePacker, Stopped, finished
from lm.shards import FORMAT, tokens_for, totals
from lm.workers import CONTEXT, worker_pool

TICK_SEC = 0.25


class Packer:
    """The state of a pack that is being made.

    Args:
        state: what progress.json says, or would say at the start.
        pieces: of the corpus, in order; a worker is told of one at a time, for the names of all may be many.
        job: what the workers are told.
    """

    def __init__(self, folder: Path, state: dict[str, Any], pieces: Sequence[Piece], job: Job):
        self.folder, self.state, self.pieces, self.job = folder, state, pieces, job
        self.tokens = sum(shard["tokens"] for shard in state["shards"])
        self._known: dict[int, list[dict[str, Any]]] = {}  # finished shards by piece
        for shard in state["shards"]:
            self._known.setdefault(shard["piece"], []).append(shard)

    @property
    def target_tokens(self) -> int | None:
        """Tokens in the blocks asked for; None for all there are."""
        blocks = self.state["target_blocks"]
        return None if blocks is None else tokens_for(blocks, self.state["header"])

    @property
    def enough(self) -> bool:
        """Whether the published shards hold the blocks asked for, or all there is."""
        return self.state["next"]["piece"] == len(self.pieces) or self._holds(self.tokens)

    def _holds(self, tokens: float) -> bool:
        return self.target_tokens is not None and tokens >= self.target_tokens

    def ask_for(self, blocks: int | None) -> bool:
        """Pack so many blocks, or all there are; whether there are enough already, in a pack that is finished."""
        asked, self.state["target_blocks"] = self.state["target_blocks"], blocks
        is_finished = (self.folder / "meta.json").exists()
        if is_finished and self.enough:
            self._tidy()
            return True
        if is_finished or asked != blocks:
            self.save()
            (self.folder / "meta.json").unlink(missing_ok=True)
        return False

    def publish(self) -> None:
        """Move up every finished shard that follows those published, until there are enough."""
        moved = False
        while not self.enough:
            at = self.state["next"]
            shards = self._shards(at["piece"])
            if len(shards) == at["shard"]:
                break
            entry, name = shards[at["shard"]], f"shard_{len(self.state['shards']):05d}.bin"
            source = self._folder(at["piece"]) / f"{at['shard']:04d}.bin"
            if source.exists():  # else it was moved before a kill
                os.replace(source, self.folder / name)
            self.state["shards"].append({"file": name, "piece": at["piece"], **entry})
            self.tokens += entry["tokens"]
            self.state["next"] = {"piece": at["piece"], "shard": at["shard"] + 1, "record": entry["records"][1]}
            if entry["last"]:
                self.state["next"] = {"piece": at["piece"] + 1, "shard": 0, "record": 0}
            moved = True
        if moved:
            sync(self.folder)
            self.save()

    def save(self) -> None:
        """Write progress.json."""
        write_sealed(self.folder / "progress.json", self.state)

    def run(self, numbers: Iterator[int], num_workers: int, publish: bool, show: Callable[[int, int], None]) -> None:
        """Pack these pieces, as many as are needed, each by one of `num_workers` processes.

        Raises: what a worker raises; what is finished stays.
        """
        done, stop = CONTEXT.Array("q", 2), CONTEXT.Value("i", 0)
        running: set[Future] = set()
        with worker_pool(num_workers, "--num_workers", "lm.piece_packer", _start, (self.job, done, stop)) as pool:
            try:
                coming = next(numbers, None)
                while running or coming is not None:
                    if publish:
                        self.publish()
                        if self.enough:
                            break
                    while coming is not None and len(running) < num_workers and self._is_needed(coming):
                        running.add(pool.submit(_pack, self.pieces[coming], coming, *self._begin(coming)))
                        coming = next(numbers, None)
                    if not running:
                        break
                    ended, running = wait(running, TICK_SEC, FIRST_COMPLETED)
                    for future in ended:
                        future.result()
                    show(*done)
            finally:
                stop.value = 1
        if publish:
            self.publish()

    def _begin(self, piece: int) -> tuple[int, int]:
        """The shard and the record at which a piece begins, for a worker."""
        following = self.state["next"]
        return (following["shard"], following["record"]) if following["piece"] == piece else (0, 0)

    def _is_needed(self, piece: int) -> bool:
        """Whether the pieces before this one are not expected to be enough."""
        return self.target_tokens is None or not self._holds(self.expected_tokens(piece))

    def expected_tokens(self, piece: int) -> float:
        """Tokens of the pieces before this one; one that is not finished has as many for its size as the finished ones."""
        shards = [self._shards(number) for number in range(piece)]
        tokens = [sum(shard["tokens"] for shard in found) for found in shards]
        done = [bool(found) and found[-1]["last"] for found in shards]
        sizes = [self.pieces[number].size for number in range(piece)]
        size_done = sum(itertools.compress(sizes, done))
        density = sum(itertools.compress(tokens, done)) / size_done if size_done else 0.0
        return sum(t if end else max(t, density * size) for t, end, size in zip(tokens, done, sizes, strict=True))

    def _shards(self, piece: int) -> list[dict[str, Any]]:
        """All finished shards of a piece, published or not."""
        found = self._known.setdefault(piece, [])
        while not (found and found[-1]["last"]) and (entry := finished(self._folder(piece), len(found))) is not None:
            found.append(entry)
        return found

    def _folder(self, piece: int) -> Path:
        return self.job.partial / f"{piece:05d}"

    def missing(self) -> list[int]:
        """The pieces that are not finished, of those that are needed."""
        unfinished = []
        for number in range(self.state["next"]["piece"], len(self.pieces)):
            if not self._is_needed(number):
                break
            if not any(shard["last"] for shard in self._shards(number)):
                unfinished.append(number)
        return unfinished

    def finish(self) -> dict[str, Any]:
        """Write meta.json, remove what only the packing needed, and return the meta."""
        meta = self.state | totals(self.state)
        write_sealed(self.folder / "meta.json", meta)
        self._tidy()
        return meta

    def _tidy(self) -> None:
        (self.folder / "progress.json").unlink(missing_ok=True)
        shutil.rmtree(self.job.partial, ignore_errors=True)


_worker: PiecePacker | None = None


def _start(job: Job, done: Any, stop: Any) -> None:
    global _worker
    _worker = PiecePacker(job, done, stop)


def _pack(piece: Piece, number: int, shard: int, record: int) -> None:
    with suppress(Stopped):
        _worker.pack(piece, number, shard, record)


def new_state(header: dict[str, Any], held_out: dict[str, Any], files: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """What progress.json says before the first shard."""
    start = {"piece": 0, "shard": 0, "record": held_out["first_record"]}
    state = {"format": FORMAT, "header": header, "target_blocks": None, "about": about, "files": files}
    return state | {"held_out": held_out, "next": start, "shards": []}
