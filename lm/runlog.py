"""The records of a run: JSONL first, and the screen and Weights & Biases from the same record."""

import html
import json
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from tqdm import tqdm

from lm.files import read_jsonl, whole_file
from lm.profiling import part

CLOCK_FIELDS = ("timestamp", "tokens_per_sec", "wait_sec")  # the only fields in which a repeated run may differ
SCREEN_EVERY_SEC = 5.0


class RunLog:
    """Writes on the main process and does nothing on the others.

    Records in logs/ carry "step", rise with it and appear once for each; on resume they are cut back to the checkpoint's step.
    Events only ever grow. On a terminal there is a progress bar, else a line every few seconds.
    """

    def __init__(self, folder: Path, main: bool, total_steps: int):
        self.folder, self.main, self.total_steps = folder, main, total_steps
        self._files: dict[str, Any] = {}
        self._wandb = None
        self._bar: tqdm | None = None
        self._printed = 0.0
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=20)  # time, tokens, step

    def open_wandb(self, project: str, name: str, config: dict[str, Any]) -> None:
        """Also log to Weights & Biases, under an id that is the same whenever this run goes on."""
        import wandb  # a second of import time that only its users pay

        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            with _writing(id_file), whole_file(id_file) as partial:
                partial.write_text(secrets.token_hex(4))
        run_id = id_file.read_text()
        self._wandb = wandb.init(project=project, name=name, id=run_id, resume="allow", dir=self.folder, config=config)

    def cut_back(self, step: int) -> None:
        """Drop every record in logs/ after `step`, and half a line that a kill may have left.

        At step 0 none is kept: a run that evaluates before its first step does so again.

        Raises: ValueError, before anything is cut, if a line is no record or the steps do not rise: a record up to `step`
            might be among those that are dropped. RuntimeError if the disk refuses.
        """
        self._recent.clear()
        if self.main:
            for file in self._files.values():
                file.close()
            self._files.clear()
            logs, events = sorted((self.folder / "logs").glob("*.jsonl")), self.folder / "events.jsonl"
            kept = {path: _bytes_until(path, step) for path in logs}
            if events.exists():
                kept[events] = events.read_bytes().rfind(b"\n") + 1
            for path, size in kept.items():
                _cut(path, size)
            self._start_bar(step)

    @part("log")
    def train(self, step: int, tokens: int, when: float | None = None, **values: Any) -> None:
        """Record one optimizer step, made `when` (seconds since 1970, by default now), after `tokens` targets in all."""
        if self.main:
            when = time.time() if when is None else when
            self._recent.append((when, tokens, step))
            (then, before, _), (now, after, _) = self._recent[0], self._recent[-1]
            rate = round((after - before) / (now - then)) if now > then else 0
            record = {"step": step, **values, "tokens": tokens, "timestamp": when, "tokens_per_sec": rate}
            self._append("logs/train.jsonl", record)
            self._show(record)
            if self._wandb:
                self._wandb.log({f"train/{key}": value for key, value in record.items()}, step=step)

    @part("log")
    def evaluation(self, step: int, **values: Any) -> None:
        """Record one evaluation."""
        if self.main:
            record = {"step": step, **values, "timestamp": time.time()}
            self._append("logs/eval.jsonl", record)
            known = (f"{key} {_brief(value)}" for key, value in values.items() if value is not None)
            self.say("  ".join([f"step {step}", *known]))
            self._recent.clear()  # the rate of training, not of evaluating
            if self._wandb:
                self._wandb.log({f"eval/{key}": value for key, value in values.items()}, step=step)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a text that the model has written."""
        if self.main:
            self._append("logs/samples.jsonl", {"step": step, "prompt": prompt, "text": text, "timestamp": time.time()})
            self.say(f"step {step} writes: {prompt}|{text}")
            if self._wandb:
                import wandb

                self._wandb.log({"sample": wandb.Html(f"<pre>{html.escape(prompt + text)}</pre>")}, step=step)

    @part("log")
    def ledger(self, step: int, **values: Any) -> None:
        """Record which examples formed one optimizer step (lm/ledger.py)."""
        if self.main:
            self._append("logs/ledger.jsonl", {"step": step, **values})

    def event(self, event: str, **values: Any) -> None:
        """Record something that happened to the run itself, and make it durable at once."""
        if self.main:
            self._append("events.jsonl", {"event": event, **values, "timestamp": time.time()})
            self.sync()
            self.say("  ".join([event, *(f"{key} {_brief(value)}" for key, value in values.items())]))

    def say(self, text: str) -> None:
        """Print one line on the main process, above the progress bar if there is one."""
        if self.main:
            if self._bar:
                self._bar.write(text)
            else:
                print(text, flush=True)

    def sync(self) -> None:
        """Make all records durable: called before a checkpoint, which must not be newer than the log."""
        for name, file in self._files.items():
            with _writing(self.folder / name):
                os.fsync(file.fileno())

    def close(self) -> None:
        """End the log; a run that goes on later opens it again."""
        if self.main:
            self.sync()
            for file in self._files.values():
                file.close()
            self._files.clear()
            if self._bar:
                self._bar.close()
            if self._wandb:
                self._wandb.finish()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        path = self.folder / name
        with _writing(path):
            if name not in self._files:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._files[name] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the whole run
            self._files[name].write(json.dumps(record, allow_nan=False) + "\n")
            self._files[name].flush()

    def _start_bar(self, step: int) -> None:
        if self._bar:
            self._bar.close()
        if sys.stderr.isatty():
            self._bar = tqdm(total=self.total_steps, initial=step, unit="step", dynamic_ncols=True)

    def _show(self, record: dict[str, Any]) -> None:
        step, rate = record["step"], record["tokens_per_sec"]
        if self._bar:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, {rate:,} tokens/s", refresh=False)
        elif time.monotonic() - self._printed > SCREEN_EVERY_SEC or step == self.total_steps:
            self._printed = time.monotonic()
            (then, _, first), (now, _, last) = self._recent[0], self._recent[-1]
            left = (self.total_steps - step) * (now - then) / (last - first) if last > first else 0
            pace = f"  {rate:,} tokens/s  {_duration(left)} left" if rate else ""  # the first line has none yet
            keys = ("loss", "loss_c4", "loss_synthetic", "synthetic_acc", "stage", "curr_acc", "lr", "grad_norm")
            keys += ("grad_norm_clipped", "param_norm")
            values = "  ".join(f"{key} {_brief(record[key])}" for key in keys if record.get(key) is not None)
            print(f"step {step}/{self.total_steps}  {values}{pace}", flush=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises: RuntimeError that says what to do if the disk refuses."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(
            f"cannot write {path} ({error}): make room or mend the disk, then run the same command again; it goes on from"
            " the newest good checkpoint"
        ) from error


def _bytes_until(path: Path, step: int) -> int:
    """The bytes of the records up to `step`, read in bounded memory: a ledger may have gigabytes."""
    kept, before = 0, -1
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            found = _step_of(line)
            if not line.endswith(b"\n") and (found is None or found > step or step == 0):
                break  # a kill in the middle of it; not of a record up to `step`, which was durable before the checkpoint
            if fault := _fault(line, found, before):
                remedy = f"mend or remove the line that is wrong, or move {path.name} elsewhere to begin a new one"
                raise ValueError(f"{path} line {number} {fault}: {remedy}")
            kept, before = kept + (len(line) if found <= step else 0), found
    return kept if step else 0


def _fault(line: bytes, step: int | None, before: int) -> str | None:
    """What is wrong with a line of a log in which the step before is `before`."""
    if step is None:
        return f"is no record ({line!r:.80}), an object with a step is needed"
    if not line.endswith(b"\n"):
        return f"has no end ({line!r:.80}), as if cut there"
    return f"has step {step} after step {before}, steps must rise" if step <= before else None


def _step_of(line: bytes) -> int | None:
    """The step of a record, be it cut off somewhere after the step, or None if there is none."""
    try:
        step = orjson.loads(line if line.endswith(b"\n") else line[: line.index(b",")] + b"}")["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if type(step) is int and step >= 0 else None  # True is no step


def _cut(path: Path, size: int) -> None:
    """Cut a file off after `size` bytes, which a full disk allows too."""
    with _writing(path), open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """All records of RUN/logs/NAME.jsonl, without the fields that a clock decides."""
    rows = read_jsonl(folder / "logs" / f"{name}.jsonl", "the training script")
    return [{key: value for key, value in row.items() if key not in CLOCK_FIELDS} for row in rows]


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
