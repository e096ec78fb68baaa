"""The stages of cleaning as steps of datatrove, whose executors run them: SLURM's on a cluster, the local one in tests."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from lm.cleaning import Job
from lm.cleaning_stages import STAGES, run_task

ROOT = Path(__file__).parents[1]


class CleaningStage(PipelineStep):
    """Every world_size-th task of one of the STAGES, from the rank on; no documents come in, and none go out."""

    type = "cleaning"

    def __init__(self, job: Job, number: int):
        self.name = STAGES[number].name
        super().__init__()
        self.job, self.number = job, number

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        stage = STAGES[self.number]
        for task in range(rank, stage.num_tasks(self.job) if stage.num_tasks else 1, world_size):
            run_task(self.job, stage, task, lambda documents: self.stat_update("documents", value=documents))
        yield from ()


def chain(job: Job, executor: Callable[..., Any], tasks: int, **settings: Any) -> Any:
    """The last of one of datatrove's executors for each stage, each of which depends on the one before.

    Args: executor: LocalPipelineExecutor or SlurmPipelineExecutor; settings: its own arguments.
    """
    last = None
    for number, stage in enumerate(STAGES):
        last = executor(
            pipeline=[CleaningStage(job, number)],
            tasks=tasks if stage.num_tasks else 1,
            logging_dir=str(job.folder.absolute() / "logs" / stage.name),
            depends=last,
            skip_completed=False,  # a task knows itself what is done, whatever the number of tasks was before
            **{name: value(stage) if callable(value) else value for name, value in settings.items()},
        )
    return last


def submit(job: Job, tasks: int, partition: str, time: str, sbatch: dict[str, str]) -> list[str]:
    """Submit a SLURM job for each stage, an array of `tasks` where there is more to do than one task; returns their numbers."""
    last = chain(
        job,
        SlurmPipelineExecutor,
        tasks,
        partition=partition,
        time=time,
        job_name=lambda stage: f"clean_{stage.name}",
        qos=None,
        mem_per_cpu_gb=2 + job.memory // 2**30,  # what a task takes besides is models, libraries and one document
        env_command=f"export PATH={quote(str(Path(sys.executable).parent))}:$PATH PYTHONPATH={quote(str(ROOT))}\n"
        f"cd {quote(str(Path.cwd()))}",
        sbatch_args={"kill-on-invalid-dep": "yes", **sbatch},
    )
    last.run()
    jobs = []
    while last is not None:
        jobs.insert(0, str(last.job_id))
        last = last.depends
    return jobs
