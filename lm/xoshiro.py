"""Compiled random integers: xoshiro256++, whose state is a row of four uint64; and how the kernels are compiled.

numba keeps what it compiled in lm/__pycache__, and looks only at the file that a function stands in to see whether it has
changed. The kernels of several files call each other, so each state of these files has a folder of its own there.
"""

import hashlib
from pathlib import Path

import numba
import numpy as np

KERNELS = ("xoshiro.py", "graph_kernels.py", "text_kernels.py", "document_kernels.py")


def cache_folder(sources: Path) -> Path:
    """Where functions compiled from these files belong; another folder for files that differ in a byte."""
    digest = hashlib.sha256(b"".join((sources / name).read_bytes() for name in KERNELS)).hexdigest()
    return sources / "__pycache__" / f"numba-{digest[:16]}"


if not numba.config.CACHE_DIR:  # NUMBA_CACHE_DIR is its user's business
    numba.config.CACHE_DIR = str(cache_folder(Path(__file__).parent))
compiled = numba.njit(cache=True, nogil=True)
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
