"""Random numbers as a function of (seed, purpose, index), never of how many were drawn before.

The generator is Philox 4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), which numpy ships:
the counter is the index, the key is made from the seed and the purpose. So example 1,000,000 costs what example 0 costs,
and a resumed run, or one with another number of processes, draws the same numbers.
"""

import functools
import hashlib

import numpy as np


@functools.lru_cache(maxsize=64)
def key(seed: int, purpose: str) -> np.ndarray:
    """The Philox key, two uint64, that `seed` and `purpose` name together."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.frombuffer(digest[:16], dtype=np.uint64)


def integers(seed: int, purpose: str, start: int, count: int) -> np.ndarray:
    """Four independent uint64 for each of the indices start .. start + count - 1, as (count, 4)."""
    bits = np.random.Philox(key=key(seed, purpose), counter=start)
    return bits.random_raw(4 * count).reshape(count, 4)


def uniforms(seed: int, purpose: str, start: int, count: int) -> np.ndarray:
    """Four independent float64 in [0, 1), of 53 bits each, for each of the indices, as (count, 4)."""
    return (integers(seed, purpose, start, count) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, purpose: str, length: int) -> np.ndarray:
    """A random order of 0 .. length - 1 (int64)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose))).permutation(length)


def torch_seed(seed: int, step: int, process: int) -> int:
    """The seed of torch's own generators (dropout) for one optimizer step on one process."""
    return int(integers(seed, f"torch/{process}", step, 1)[0, 0] >> np.uint64(1))
