"""Trainers as real processes that start in a second: forked from one that has imported torch and transformers already.

Each runs the script itself, as __main__, in a session of its own with its own files and signals. Several get the environment
that torchrun gives, so that they form one process group; there is no torchrun above them, so each has its own exit code.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
SAY_WHERE = signal.SIGUSR2  # in which line each thread is
Before = Callable[[], None] | None
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(  # of lm too, if this is started in the repository's folder
    [
        "accelerate",
        "torch._dynamo",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "lm.session",
        "lm.mixed_rows",
        "lm.packing",
    ]
)


def arguments(**values: Any) -> list[str]:
    """A command line of these options."""
    return [f"--{name}={value}" if value is not True else f"--{name}" for name, value in values.items() if value is not False]


class Launch:
    """`count` processes of one script, which write to `out`.

    Args:
        options: its arguments; "command", a word before them; and "environment", variables that it gets beside those of this
            process.
        before: called in each process before the script; it may put a fault into it.
    """

    def __init__(
        self, script: str, options: dict[str, Any], out: Path, count: int = 1, before: Callable[[], None] | None = None
    ):
        options = dict(options)
        shared = dict(os.environ) | {"OMP_NUM_THREADS": "1"} | options.pop("environment", {})
        command = [options.pop("command")] if "command" in options else []
        if count > 1:
            shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": str(_free_port())}
        self.out, self.processes = out, []
        for rank in range(count):
            environment = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {})
            argv = [*command, *arguments(**options)]
            started = CONTEXT.Process(target=_run, args=(ROOT / script, argv, environment, out, before))
            started.start()
            self.processes.append(started)

    def send(self, number: int, process: int | None = None) -> None:
        """A signal to one process, or to all (those that have ended are passed by)."""
        for each in self.processes if process is None else [self.processes[process]]:
            with contextlib.suppress(ProcessLookupError):
                if each.is_alive():
                    os.kill(each.pid, number)

    def kill(self) -> None:
        """SIGKILL to all, loader processes included, and wait for their end."""
        family = self._loaders()
        self.send(signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for each in self.processes:
            each.join()
        for member in family:  # an orphan may stay a zombie for seconds, until init looks after it
            with contextlib.suppress(psutil.NoSuchProcess):
                while member.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.001)

    def _loaders(self) -> list[psutil.Process]:
        found = []
        for each in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += psutil.Process(each.pid).children(recursive=True)
        return found

    def ended(self) -> bool:
        """Whether none of them runs any more."""
        return not any(each.is_alive() for each in self.processes)

    def wait(self, timeout: float = 120) -> list[int]:
        """The exit code of each. Raises: TimeoutError, after killing them, if they take longer; it says where they were."""
        deadline = time.monotonic() + timeout
        for each in self.processes:
            each.join(max(deadline - time.monotonic(), 0))
        if not self.ended():
            self.send(SAY_WHERE)
            for loader in self._loaders():
                with contextlib.suppress(psutil.NoSuchProcess):
                    loader.send_signal(SAY_WHERE)
            time.sleep(1)
            self.kill()
            raise TimeoutError(f"it did not end in {timeout} s: {self.said()}")
        return [each.exitcode for each in self.processes]

    def said(self) -> str:
        """The end of what they printed."""
        return self.out.read_text(errors="replace")[-12000:] if self.out.exists() else ""


def _run(script: Path, argv: list[str], environment: dict[str, str], out: Path, before: Before) -> None:
    multiprocessing.set_start_method("fork", force=True)  # the default, which a forked one does not inherit
    os.setsid()
    log = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    faulthandler.register(SAY_WHERE, file=2)
    os.environ.update(environment)
    sys.argv = [str(script), *argv]
    sys.path.insert(0, str(script.parent))
    if before is not None:
        before()
    runpy.run_path(str(script), run_name="__main__")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
