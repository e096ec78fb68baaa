"""`accelerate launch` on one node of a SLURM job, which stops and ends as the trainers do.

    srun python scripts/launch_on_node.py pptrain.py --scratch_dir S ...

Starts a trainer for each GPU of the node (or PROCESSES_PER_NODE of them), together with those on the other nodes of the job.
SIGTERM and SIGUSR1 are passed on to the trainers, which SLURM itself does not signal where it tracks processes by cgroups; and
again every few seconds, because a trainer that is still importing does not listen yet. The exit code is that of the trainer
which ended first, where `accelerate launch` would turn every one into 1.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

AGAIN_AFTER_SEC = 5
# Before it has handlers of its own a trainer must not die of a signal that another process of the job can still hear.
TRAINER = ["--no_python", "bash", "-c", 'trap "" TERM USR1; exec python "$@"', "trainer"]


def pass_on(number: int, _frame: Any) -> None:
    """Send this signal to all child processes, now and again every few seconds."""
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), number)
    signal.signal(signal.SIGALRM, lambda *_: pass_on(number, None))
    signal.alarm(AGAIN_AFTER_SEC)


def launch_arguments(job: Mapping[str, str]) -> list[str]:
    """What `accelerate launch` is told about processes, from the environment variables of a SLURM step."""
    nodes, on_node = int(job["SLURM_NNODES"]), int(job.get("PROCESSES_PER_NODE") or job.get("SLURM_GPUS_ON_NODE") or 1)
    arguments = ["--num_machines", str(nodes), "--num_processes", str(nodes * on_node)]
    arguments += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    if nodes * on_node > 1:
        arguments += ["--multi_gpu", "--machine_rank", job["SLURM_NODEID"]]
        arguments += ["--main_process_ip", job["SLURM_LAUNCH_NODE_IPADDR"]]  # srun runs on the first node
        arguments += ["--main_process_port", str(20_000 + int(job["SLURM_JOB_ID"]) % 10_000)]
    return arguments


def main(trainer: list[str]) -> int:
    """Run the trainers of this node and return the exit code of the one that ended first."""
    for number in (signal.SIGTERM, signal.SIGUSR1):  # before the imports, which take seconds
        signal.signal(number, pass_on)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT"  # or on SIGTERM torch kills the trainers after 30 s
    if "SLURM_GPUS_ON_NODE" not in os.environ:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        launch_command(launch_command_parser().parse_args([*launch_arguments(os.environ), *TRAINER, *trainer]))
    except subprocess.CalledProcessError as error:  # of the only process
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    else:
        code = 0
    for number in (signal.SIGTERM, signal.SIGUSR1):  # or Python would die of them while it ends
        signal.signal(number, signal.SIG_IGN)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
