"""Opening a run: its processes, folder, provenance, log and stop signals. Every trainer begins here.

RUN/run.json       the command, the arguments and what follows from them, commit, versions (written when the run first starts)
RUN/*.diff         what differed from the commit at the first start, and at a later one if that was something else
RUN/events.jsonl   every start, resume, skipped update, rollback, stop and end, in the order in which they happened
RUN/logs/*.jsonl   the records (lm/runlog.py)
"""

import errno
import fcntl
import multiprocessing
import os
import platform
import shlex
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from lm.args import RunArgs
from lm.files import read_json, sha256, write_json
from lm.provenance import Tree, keep_diff, read_tree, worth_saying
from lm.runlog import RunLog

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint; the same command goes on from there
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
T = TypeVar("T")
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy", "safetensors", "trl")


class StopSignal:
    """SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any process stops all at the next step boundary; Ctrl-C twice, before it."""

    def __init__(self) -> None:
        self.received = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: Any) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


@contextmanager
def signals_kept_from_children() -> Iterator[None]:
    """Processes that are started in here never get a stop signal: they end when the trainer ends them.

    They inherit what is blocked here, from their first moment on; a signal to the trainer waits until the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class Run:
    """One process's view of an opened run."""

    folder: Path
    accelerator: Accelerator
    log: RunLog
    stop: StopSignal
    tree: Tree  # the code
    at_end: ExitStack  # what is still to be done when the run is left, also after an error

    def agree(self, *flags: int) -> list[int]:
        """The maximum of each flag over all processes, so that all of them act alike."""
        return self.accelerator.gather(torch.tensor([flags], device=self.accelerator.device)).amax(dim=0).tolist()

    def close(self) -> None:
        """Leave together: a launcher that sees one process end with a code terminates those that are still writing."""
        self.log.close()
        self.accelerator.wait_for_everyone()


def beside(make: Callable[[], T]) -> Future[T]:
    """Begin to make something while the caller goes on; `result` waits for it, and raises what making it raised."""
    executor = ThreadPoolExecutor(1)
    making = executor.submit(make)
    executor.shutdown(wait=False)
    return making


def main_decides(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What `decide` returns on the main process, on every process; its FileNotFoundError and ValueError are raised on all."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except (FileNotFoundError, ValueError) as error:
            answer[1] = error
    found, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return found


def run_and_exit(main: Callable[[T], int], args: T) -> NoReturn:
    """Run a trainer's `main` and end this process with its exit code, once everything is written and synced.

    Python's own end is not waited for. After an error it would join loader processes, which leave signals to the trainer and
    so do not end when they are asked to. And with several processes the gradient reducer of torch 2.13 takes the group down
    while it holds the interpreter's lock, for which a thread of that group may be waiting (seen with gloo: one exit in ten).
    """
    try:
        code = main(args)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:
        traceback.print_exc()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            print("the disk is full: make room, then run the same command again; it goes on from the newest good checkpoint")
        code = 1
    kill_loaders()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill_loaders() -> None:
    """End loader processes that are still there: they leave signals to the trainer, so Python would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a loader that was killed
    for loader in multiprocessing.active_children():
        loader.kill()


def start_accelerator(precision: str, force_cpu: bool, cpu_offload: bool = False) -> Accelerator:
    """The processes of this run, each with its device; with `cpu_offload` they can exchange what is in CPU memory too.

    Raises: RuntimeError if the launcher started another number of processes than believe to work together;
        ValueError for fp16 without a GPU.
    """
    cpu = force_cpu or not torch.cuda.is_available()
    if precision in ("fp16", "tf32") and cpu:
        raise ValueError(f"--precision {precision} needs a GPU, and none is in use: pass --precision fp32 or bf16")
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ:
        # What `accelerate launch --cpu --num_processes 2` leaves behind: it starts one process and says nothing.
        raise RuntimeError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu: leave out --cpu and"
            " pass --multi_gpu (without a GPU too), or --num_processes 1; or unset MASTER_PORT if you exported it"
        )
    if cpu_offload and not cpu:
        _serve_cpu_tensors_too()
    accelerator = Accelerator(cpu=cpu, mixed_precision="no" if precision in ("fp32", "tf32") else precision)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != world_size:
        raise RuntimeError(
            f"the launcher started {world_size} processes, but each believes it is one of {accelerator.num_processes}:"
            " they would all train the same and write the same files; start them with accelerate launch --multi_gpu"
        )
    return accelerator


def _serve_cpu_tensors_too() -> None:
    """Have accelerate make process groups of NCCL and gloo, and not take over the dividing of the model, as these names ask."""
    names = {"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}
    os.environ.update(names)
    PartialState()
    for name in names:
        del os.environ[name]


def set_numerics(args: RunArgs) -> None:
    """Let torch draw from --seed, and compute as --precision, --deterministic and --detect_anomaly say, from now on."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if args.precision == "tf32" else "ieee"
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # with warn_only, attention's backward pass would stay as it is
        torch.utils.deterministic.fill_uninitialized_memory = False  # it would only cost time: nothing reads such memory
    torch.autograd.set_detect_anomaly(args.detect_anomaly)
    torch.manual_seed(args.seed)


@contextmanager
def open_run(args: RunArgs, derived: dict[str, Any], accelerator: Accelerator) -> Iterator[Run]:
    """Make or enter the run's folder, lock it, write down what this run is, and begin to listen to signals.

    Raises: ValueError if the code is not committed and --dirty not given; RuntimeError if another process is training in the
        folder, or nothing can be written there.
    """
    tree = main_decides(accelerator, lambda: read_tree(args.dirty))
    folder, main = Path(args.output_dir), accelerator.is_main_process
    lock, known = None, []
    if main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / ".lock", "w")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise RuntimeError(f"cannot write in {folder} ({error}): make room, or pass another --output_dir") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is training in {folder}: wait for it, or pass another --output_dir") from None
        known = _write_provenance(folder, args, derived, accelerator, tree)
    set_numerics(args)
    log = RunLog(folder, main, derived["total_steps"])
    if main and args.wandb_project:
        log.open_wandb(args.wandb_project, args.wandb_run_name or folder.name, asdict(args) | derived | tree.record)
    for line in known:
        log.say(line)
    accelerator.wait_for_everyone()
    with ExitStack() as at_end:
        if lock is not None:
            at_end.callback(lock.close)
        yield Run(folder, accelerator, log, StopSignal(), tree, at_end)


def _write_provenance(folder: Path, args: RunArgs, derived: dict[str, Any], accelerator: Accelerator, tree: Tree) -> list[str]:
    """Write down what the run is and what code makes it; returns what is to be said of that."""
    resumed = any((folder / "checkpoints").glob("step_*"))
    if not resumed:
        for leftover in folder.glob("uncommitted*.diff"):
            leftover.unlink()
    diff = keep_diff(folder, tree.diff)
    if resumed and (folder / "run.json").exists():  # a resumed run keeps the record of its beginning
        return worth_saying(tree, read_json(folder / "run.json", "the training script").get("commit"), diff)
    about = {
        "script": Path(sys.argv[0]).name,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "args": asdict(args),
        "derived": derived,
        **tree.record,
        "uncommitted_diff": diff and {"file": diff.name, "sha256": sha256(diff)},
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else f"cpu, {platform.machine()}",
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(folder / "run.json", about)
    return worth_saying(tree, tree.commit, diff)
