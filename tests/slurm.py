"""A real SLURM cluster on this machine: munged, slurmctld and one slurmd for each node, all of them on 127.0.0.1."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
from conftest import free_port
from training import ROOT

NODES, GPUS = ("n1", "n2", "n3"), 8
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
MailProg={folder}/mail
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
FirstJobId={first_job}
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=15
SlurmdTimeout=60
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=4000 Gres=gpu:{gpus}\n"


def why_not() -> str:
    """What a cluster here would need and does not find; empty if there is all."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    return ""


class Cluster:
    """Nodes of 8 GPUs, which are names without a device; a job that is put back waits 6 seconds before it runs again."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "ACCELERATE_USE_CPU": "true"}
        self.environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self.daemons: dict[str, subprocess.Popen] = {}

    def configure(self) -> None:
        """Write slurm.conf and what else the daemons read."""
        for name in ("state", "gpu", *NODES):
            (self.folder / name).mkdir()
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu/{number}", 0o600 | 0o020000, os.makedev(195, number))
        host, port = socket.gethostname().split(".")[0], free_port()
        config = CONFIG.format(host=host, port=port, folder=self.folder, first_job=free_port())
        config += "".join(NODE.format(name=name, host=host, port=free_port(), gpus=GPUS) for name in NODES)
        (self.folder / "slurm.conf").write_text(config)
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-3] Name=gpu File={self.folder}/gpu/[0-{GPUS - 1}]\n")
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o600)
        (self.folder / "mail").write_text(f'#!/bin/sh\necho "$*" >> {self.folder}/mails\n')
        (self.folder / "mail").chmod(0o700)

    def start(self) -> None:
        """Start all daemons, and wait until the nodes are ready."""
        files = {"socket": "munge.sock", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "munge.log"}
        munge = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self.start_daemon("munged", "--foreground", "--force", *munge)
        wait_until((self.folder / "munge.sock").exists, 10, self.log)
        self.start_daemon("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        wait_until(lambda: self.node_states() == {name: "idle" for name in NODES}, 30, self.log)

    def start_daemon(self, *command: str, name: str = "") -> None:
        with open(self.folder / "log", "a") as log:
            self.daemons[name or command[0]] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        self.start_daemon("slurmd", "-D", "-N", name, name=name)

    def log(self) -> str:
        return (self.folder / "log").read_text()[-4000:]

    def ask(self, *command: str | Path) -> str:
        """What a SLURM command prints."""
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.strip()

    def node_states(self) -> dict[str, str]:
        with contextlib.suppress(subprocess.CalledProcessError):  # while slurmctld starts
            return dict(line.split() for line in self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%N %t").splitlines())
        return {}

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job: JobState, Restarts, ExitCode, NodeList and more."""
        pairs = self.ask("scontrol", "--oneliner", "show", "job", number).split()
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

    def fail_node(self, name: str) -> None:
        """SIGKILL slurmd and everything that it started, and let the controller take note of it at once."""
        lost = {psutil.Process(self.daemons.pop(name).pid)}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):  # it may end by itself meanwhile
                if any(environment(child).get("SLURMD_NODENAME") == name for child in process.children()):
                    lost |= {process, *process.children(recursive=True)}
        for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody is left for a moment to tell of the others' end
            for process in lost:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        self.ask("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=failed")

    def processes(self) -> list[psutil.Process]:
        """All daemons, and what runs under them."""
        conf = self.environment["SLURM_CONF"]
        return [process for process in psutil.process_iter() if environment(process).get("SLURM_CONF") == conf]

    def stop(self) -> None:
        """SIGKILL all of it."""
        for _ in range(2):  # what the first round missed because it was just being started
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        for daemon in self.daemons.values():
            daemon.wait()


def environment(process: psutil.Process) -> dict[str, str]:
    """Its environment variables; psutil finds none of a slurmstepd, which writes its name over the first of them."""
    try:
        content = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return {}
    return dict(pair.split("=", 1) for pair in content.split("\0") if "=" in pair)


def wait_until(true: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    """Return as soon as it is true; fail with the explanation if that takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.1)


@contextlib.contextmanager
def start_cluster() -> Iterator[Cluster]:
    """A cluster that has ended with everything it started when the block is left."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # the paths of its sockets must be short
        cluster = Cluster(Path(folder))
        try:
            cluster.configure()
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
