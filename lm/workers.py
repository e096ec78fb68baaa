"""Worker processes of a builder: they start quickly, end at Ctrl-C without a word, and never outlive it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


@contextmanager
def worker_pool(
    num_workers: int, flag: str, preload: str, start: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """Processes forked by a server that has imported module `preload` once and has no threads of ours.

    Args:
        flag: the argument that says how many there are, for the error.
        start: called once in each, with `arguments`.

    Raises: RuntimeError if one of them was killed.
    """
    CONTEXT.set_forkserver_preload([preload])
    pool = ProcessPoolExecutor(num_workers, CONTEXT, _start, (start, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError(f"a worker was killed, as happens when memory runs out: pass a smaller {flag}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_the_builder, daemon=True).start()
    if start is not None:
        start(*arguments)


def _end_with_the_builder() -> None:
    """Even when it is gone by SIGKILL."""
    multiprocessing.parent_process().join()
    os._exit(1)
