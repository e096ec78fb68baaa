"""Compiled random integers: xoshiro256++, whose state is a row of four uint64; and how the kernels are compiled.

numba keeps what it compiled, and looks only at the file that a function stands in to see whether it has changed. The kernels of
several files call each other, so each state of these files has a folder of its own (`cache_folder`).
"""

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numba
import numba.core.entrypoints
import numpy as np
from numba.core.caching import FunctionCache

KERNELS = ("xoshiro.py", "graph_kernels.py", "text_kernels.py", "document_kernels.py")


def cache_folder(sources: Path) -> Path | None:
    """Where functions compiled from these files belong; another folder for files that differ in a byte.

    It is in __pycache__ beside them, or among the user's caches if nothing can be written there; None if nowhere.
    """
    digest = hashlib.sha256(b"".join((sources / name).read_bytes() for name in KERNELS)).hexdigest()
    places = [sources / "__pycache__"]
    if os.path.isabs(of_user := os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")):  # else he has no home
        places.append(Path(of_user, "small-lm-research"))
    for place in places:
        folder = place / f"numba-{digest[:16]}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            return folder
    return None


class OneWriter(FunctionCache):
    """numba's cache of a function, written by one process at a time, and not at all if the disk refuses.

    numba reads the index of a function, adds to it and writes it again. Of two processes that do so at once one loses its
    entry, whose number then goes to code for other types.
    """

    def save_overload(self, sig: object, data: object) -> None:
        with suppress(OSError), open(Path(self.cache_path) / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().save_overload(sig, data)


def compiled(function: Callable) -> Callable:
    """The function as machine code, compiled when it is first called, or read from where another process has kept it."""
    dispatcher = numba.njit(nogil=True)(function)
    if numba.config.CACHE_DIR:
        dispatcher._cache = OneWriter(function)
    return dispatcher


if not numba.config.CACHE_DIR:  # NUMBA_CACHE_DIR is its user's business
    numba.config.CACHE_DIR = str(cache_folder(Path(__file__).parent) or "")
# Else the first call of a kernel imports all packages that extend numba: of awkward, that takes as long as all else of it.
numba.core.entrypoints._already_initialized = True
_uint64 = np.uint64


@compiled
def random_bits(state: np.ndarray) -> int:
    """The next 64 bits of xoshiro256++ (Blackman & Vigna, "Scrambled linear pseudorandom number generators", 2021)."""
    total = state[0] + state[3]
    result = ((total << _uint64(23)) | (total >> _uint64(41))) + state[0]
    carried = state[1] << _uint64(17)
    state[2] ^= state[0]
    state[3] ^= state[1]
    state[1] ^= state[2]
    state[0] ^= state[3]
    state[2] ^= carried
    state[3] = (state[3] << _uint64(45)) | (state[3] >> _uint64(19))
    return result


@compiled
def below(state: np.ndarray, bound: int) -> int:
    """A uniform integer of 0 .. bound - 1, bound <= 2**32, without bias (Lemire, "Fast random integer generation", 2019)."""
    low_half = _uint64(0xFFFFFFFF)
    scaled = (random_bits(state) >> _uint64(32)) * _uint64(bound)
    if scaled & low_half < _uint64(bound):
        unfair = (_uint64(2**32) - _uint64(bound)) % _uint64(bound)
        while scaled & low_half < unfair:
            scaled = (random_bits(state) >> _uint64(32)) * _uint64(bound)
    return np.int64(scaled >> _uint64(32))
