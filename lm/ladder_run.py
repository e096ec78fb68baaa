"""Running the cells of a ladder: each a few commands after another, several cells at once, each in a slot of its own.

A cell that is done has CELL/cell.json, which says by which commands; cells that are done are skipped, and one that was stopped
goes on where it was, since every command of it does. Output goes to CELL.log.
"""

import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from lm.files import read_json, write_json
from lm.ladder_plan import Cell
from lm.run import EXIT_STOPPED, STOP_SIGNALS

TICK_SEC = 0.2
Command = list[str]
Environment = dict[str, str]


def is_done(cell: Cell, commands: Sequence[Command]) -> bool:
    """Whether all of these commands were done for the cell."""
    path = cell.folder / "cell.json"
    return path.is_file() and read_json(path, "ladder.py run") == {"commands": [list(command) for command in commands]}


@dataclass
class Runner:
    """Runs cells in slots until all are done or a signal stops it.

    Args:
        slots: environment variables of each slot (which GPUs it has, how many threads); as many cells run at once.
        say: prints a line.
    """

    slots: Sequence[Environment]
    say: Callable[[str], None] = print
    stopped: bool = False
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._asked: set[subprocess.Popen] = set()  # to stop
        self._lock = threading.Lock()

    def run(self, work: Sequence[tuple[Cell, list[Command]]]) -> int:
        """Do all of it; returns 0, EXIT_STOPPED after a signal, or 1 if a cell has failed, which stops no other."""
        handlers = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        free: SimpleQueue[Environment] = SimpleQueue()
        for slot in self.slots:
            free.put(slot)
        begun, done = time.monotonic(), 0.0
        try:
            with ThreadPoolExecutor(len(self.slots)) as pool:
                left = {pool.submit(self._one, cell, commands, free): cell for cell, commands in work}
                while left:
                    ended, _ = wait(left, TICK_SEC, FIRST_COMPLETED)
                    self._pass_on()
                    for future in ended:
                        cell, what = left.pop(future), future.result()
                        done += cell.flops
                        rest = sum(other.flops for other in left.values()) * (time.monotonic() - begun) / done
                        if what:
                            self.say(f"{what} {cell.name}  {len(left)} left, about {rest / 60:.0f} min")
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.failed:
            self.say(f"failed: {', '.join(self.failed)}; see their .log, then run the same command again")
        if self.stopped:
            self.say("stopped: the same command goes on")
            return EXIT_STOPPED
        return 1 if self.failed else 0

    def _note(self, _number: int, _frame: object) -> None:
        self.stopped = True

    def _pass_on(self) -> None:
        """Ask every command that runs to stop, once, if a signal asked for it; each leaves a checkpoint."""
        if self.stopped:
            with self._lock:
                for process in self._running - self._asked:
                    process.send_signal(signal.SIGTERM)
                    self._asked.add(process)

    def _one(self, cell: Cell, commands: list[Command], free: "SimpleQueue[Environment]") -> str:
        """Run a cell's commands in the next free slot; what became of it, or "" if it was not begun."""
        slot = free.get()
        try:
            if self.stopped:
                return ""
            cell.folder.mkdir(parents=True, exist_ok=True)
            self.say(f"begin {cell.name}")
            for command in commands:
                if code := self._command(command, slot, Path(f"{cell.folder}.log")):
                    if self.stopped or code == EXIT_STOPPED:  # someone may have asked this one alone
                        self.stopped = True
                        return "stopped"
                    self.failed.append(cell.name)
                    return f"exit code {code}, see {cell.folder}.log:"
            write_json(cell.folder / "cell.json", {"commands": commands})
            return "done"
        except OSError as error:  # a full disk, say
            self.failed.append(cell.name)
            return f"failed ({error}):"
        finally:
            free.put(slot)

    def _command(self, command: Command, slot: Environment, log: Path) -> int:
        with open(log, "a", encoding="utf-8") as out:
            print("$", shlex.join(command), file=out, flush=True)
            with self._lock:
                if self.stopped:
                    return EXIT_STOPPED
                process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | slot, start_new_session=True)
                self._running.add(process)
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code
