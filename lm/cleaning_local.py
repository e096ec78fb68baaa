"""Processes of this machine that go through the stages of cleaning; lm/cleaning_slurm.py is for many machines."""

import sys
import time
from concurrent.futures import FIRST_COMPLETED, wait
from typing import Any

from tqdm import tqdm

from lm.cleaning import Job
from lm.cleaning_stages import STAGES, Stage, run_task
from lm.workers import CONTEXT, worker_pool

SHOW_EVERY_SEC = 10
TICK_SEC = 0.25


class Display:
    """A bar on a terminal, a line every 10 seconds elsewhere: the tasks of a stage, and the documents that it has read."""

    def __init__(self, stage: Stage, num_tasks: int):
        self.stage, self.begin = stage, time.monotonic()
        self.said = self.begin
        self.bar = tqdm(total=num_tasks, desc=stage.name, unit="task", disable=not sys.stderr.isatty())

    def __call__(self, done: int, documents: int) -> None:
        now = time.monotonic()
        rate = f"{documents:,} documents, {documents / (now - self.begin):,.0f}/s" if self.stage.reads_documents else ""
        if not self.bar.disable:
            self.bar.set_postfix_str(rate)
            self.bar.update(done - self.bar.n)
        elif now - self.said >= SHOW_EVERY_SEC:
            self.said = now
            print(f"{self.stage.name}: {done} of {self.bar.total} tasks{rate and '; ' + rate}", flush=True)


def run_locally(job: Job, num_workers: int) -> None:
    """Run all stages. Raises: what a task raises; what is finished stays, and is not done again."""
    told = CONTEXT.Value("q", 0)
    with worker_pool(num_workers, "--num_workers", "lm.cleaning_stages", _start, (job, told)) as pool:
        for number, stage in enumerate(STAGES):
            num_tasks, told.value = stage.num_tasks(job) if stage.num_tasks else 1, 0
            show, coming, running, done = Display(stage, num_tasks), iter(range(num_tasks)), set(), 0
            while done < num_tasks:
                while len(running) < 2 * num_workers and (task := next(coming, None)) is not None:
                    running.add(pool.submit(_run, number, task))
                ended, running = wait(running, TICK_SEC, FIRST_COMPLETED)
                for future in ended:
                    future.result()
                done += len(ended)
                show(done, told.value)
            show.bar.close()


_job: Job | None = None
_told: Any = None


def _start(job: Job, told: Any) -> None:
    global _job, _told
    _job, _told = job, told


def _run(stage: int, task: int) -> None:
    run_task(_job, STAGES[stage], task, _tell)


def _tell(documents: int) -> None:
    with _told.get_lock():
        _told.value += documents
