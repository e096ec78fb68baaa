"""Starting, watching, killing and comparing real training processes."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from lm.files import sha256
from lm.runlog import records

ROOT = Path(__file__).parent.parent
TINY = {
    "dirty": True,  # the tests are of this tree, committed or not
    "K": 2,
    "model": "neox-64x2",
    "sequence_length": 24,
    "effective_batch": 12,
    "micro_batch": 3,
    "token_budget": 24 * 12 * 40,  # 40 steps
    "lr": 3e-3,
    "warmup_steps": 5,
    "steps_per_eval_epoch": 8,
    "checkpoint_interval_steps": 5,
    "eval_windows": 16,
}


def flags(**values) -> list[str]:
    return [f"--{name}={value}" if value is not True else f"--{name}" for name, value in values.items()]


def start(
    folder: Path,
    data: Path,
    processes: int = 1,
    script: Path = ROOT / "train.py",
    settings: dict = TINY,
    paths: tuple[Path, ...] = (ROOT,),
    **changes,
) -> subprocess.Popen:
    """Start a trainer on one or more processes, in a process group of its own; its output goes to FOLDER.out."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = flags(**settings | changes, data_dir=data, output_dir=folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    with open(f"{folder}.out", "a") as out:
        return subprocess.Popen(
            [*launcher, str(script), *options],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder.parent,
            env=environment,
            start_new_session=True,
        )


def run(folder: Path, data: Path, processes: int = 1, **changes) -> int:
    """Train to the end and return the exit code."""
    process = start(folder, data, processes, **changes)
    try:
        return process.wait(timeout=120)
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and every process below it (torchrun gives each worker a session of its own)."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        for member in [process, *family]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()


def wait_for_step(folder: Path, step: int, process: subprocess.Popen, out: Path | None = None, seconds: float = 90) -> None:
    """Return as soon as the log has this step."""
    out = out or Path(f"{folder}.out")
    log = folder / "logs" / "train.jsonl"
    deadline = time.monotonic() + seconds
    while not log.exists() or f'{{"step": {step}, ' not in log.read_text():
        assert process.poll() is None, f"it ended before step {step}: {out.read_text()[-4000:]}"
        assert time.monotonic() < deadline, out.read_text()[-4000:]
        time.sleep(0.002)


def output(folder: Path) -> str:
    return Path(f"{folder}.out").read_text()[-4000:]


def outcome(folder: Path) -> dict:
    """All of a finished run that must not depend on how often it was interrupted."""
    newest = sorted((folder / "checkpoints").glob("step_????????"))[-1]
    files = [newest / "model.safetensors", newest / "optimizer.safetensors", newest / "state.json"]
    files += [folder / "final" / "model.safetensors", folder / "best" / "model.safetensors"]
    return {
        **{f"{file.parent.name}/{file.name}": sha256(file) for file in files if file.parent.name != "best" or file.exists()},
        "train": records(folder, "train"),
        "eval": records(folder, "eval"),
    }


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
