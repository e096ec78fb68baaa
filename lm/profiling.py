"""Where a step goes: ranges of time in the code, and a profile of five steps of a run that is made of them.

RUN/profile/trace_0.json.gz   a Chrome trace (chrome://tracing, ui.perfetto.dev) of process 0, and so on for each process
RUN/profile/steps.jsonl       of process 0: each part of each traced step
RUN/profile/profile.json      of process 0: their means, and the operators that cost most
"""

import json
from contextlib import ContextDecorator
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import profile, record_function, schedule

from lm.files import whole_file, write_json
from lm.trace import lines_of, read_trace, summary

if TYPE_CHECKING:  # a run has a log, which has ranges
    from lm.run import Run

WARM_UP, TRACED = 3, 5  # steps


class part(ContextDecorator):
    """The code within is this part of a step (`lm.trace.PARTS`), which a profile tells apart; without one it costs nothing."""

    def __init__(self, name: str):
        self.name = name
        self.ranges: list[record_function] = []  # a decorated function may call itself

    def __enter__(self) -> None:
        if torch.autograd._profiler_enabled():  # record_function itself would cost twenty times as much as this question
            self.ranges.append(record_function(self.name))
            self.ranges[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        if self.ranges:
            self.ranges.pop().__exit__(*error)


class Profile:
    """Traces steps 4 to 8 of this process's own, counted from where it started or went on; then it is over."""

    def __init__(self, run: "Run", model: torch.nn.Module):
        self.run, self.folder = run, run.folder / "profile"
        self.steps: list[int] = []  # that were made
        self.tokens: list[int] = [0]  # that went through the model in training, for each of them and the one that is being made
        self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        when = schedule(skip_first=WARM_UP - 1, wait=0, warmup=1, active=TRACED, repeat=1)
        self.profiler: profile | None = profile(schedule=when, on_trace_ready=self._report)
        run.at_end.callback(self.close)
        self.profiler.start()

    def _count(self, _model: torch.nn.Module, _args: tuple, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self.tokens[-1] += given["input_ids"].numel()

    def step(self, step: int) -> None:
        """A step has been made, and this was its number."""
        if self.profiler is not None:
            self.steps.append(step)
            self.tokens.append(0)
            self.profiler.step()
            if len(self.steps) == WARM_UP + TRACED:
                self.close()

    def close(self) -> None:
        """End the profile; of a run that ended before, it is of the steps that there were."""
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        self.hook.remove()
        made = len(self.steps)
        if made < WARM_UP + TRACED:
            self.run.log.say(f"{made} steps were made, {WARM_UP + TRACED} are needed for a whole profile: train for longer")
        if made <= WARM_UP:  # nothing was traced, or a stretch that is no step
            profiler.on_trace_ready = None
        profiler.stop()

    def _report(self, profiler: profile) -> None:
        process = self.run.accelerator.process_index
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"trace_{process}.json.gz"
        profiler.export_chrome_trace(str(path))
        if process:
            return
        steps = dict(enumerate(self.steps))
        trace = read_trace(path, steps)
        seconds = sum(row["ms"] for row in trace.rows) / 1000
        about = {"steps": self.steps[WARM_UP:], "num_processes": self.run.accelerator.num_processes}
        about |= {"tokens_per_sec": sum(self.tokens[WARM_UP : len(self.steps)]) / seconds} | summary(trace)
        write_json(self.folder / "profile.json", about)
        with whole_file(self.folder / "steps.jsonl") as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in trace.rows))
        for line in lines_of(about):
            self.run.log.say(line)
        self.run.log.say(f"the trace is in {path}: open it in chrome://tracing or ui.perfetto.dev")
