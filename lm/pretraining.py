"""Pretraining runs, read from their records: what they measured, which are seeds of one setting, and what else differs."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.excess import over_runs
from lm.run_records import is_finished, read_run, whole_lines

MADE_BY = "pretrain.py"

# Arguments that say where a run lies and how it is looked after, or whose meaning is in FOLLOWS; so are all that end in _dir.
FREE = {"resume_from", "force_cpu", "deterministic", "detect_anomaly", "checkpoint_interval_steps", "max_step_checkpoints"}
FREE |= {"wandb_project", "wandb_run_name", "log_every", "eval_every", "verify_data", "max_wait_sec", "micro_batch"}
FREE |= {"grad_accum", "model", "pptrain_checkpoint", "seed", "ledger", "dirty", "profile", "epochs", "sample_every"}
FREE |= {"sample_prompt", "sample_tokens", "test_documents", "cpu_offload", "grad_checkpoint"}
FREE |= {"ignore_estimate", "compile"}
FOLLOWS = ("initial_weights", "pack", "seq_len", "effective_batch", "total_steps", "num_parameters", "vocab_size")
COMPARED = ("initial_weights", "mixin_percent", "mixin_loss")  # what runs are made to differ in


@dataclass(frozen=True)
class Pretraining:
    """What is known of a run, be it finished or not."""

    folder: Path
    label: str  # short, and no other run's
    run: dict[str, Any]  # run.json
    train: list[dict[str, Any]]  # the records of steps
    held_out: list[dict[str, Any]]  # the records of evaluations, the first of them before step 1
    finished: bool
    diverged: bool = False  # it has given up: loss or gradient stayed non-finite

    @property
    def last_step(self) -> int:
        """The last step that there is a record of."""
        return max(record["step"] for record in self.train + self.held_out)

    @property
    def settings(self) -> dict[str, Any]:
        """What the run was asked to do, whatever its seed."""
        args, derived = self.run["args"], self.run["derived"]
        asked = {name: value for name, value in args.items() if name not in FREE and not name.endswith("_dir")}
        data = Path(args["data_dir"]).name if args.get("data_dir") else None  # its name tells the task, wherever it lies
        return asked | {name: derived.get(name) for name in FOLLOWS} | {"data_dir": data}

    def tokens(self, records: Sequence[dict[str, Any]]) -> np.ndarray:
        """Tokens of C4 drawn until each of the records, int64."""
        return np.array([record["c4_block_idx"] for record in records], dtype=np.int64) * self.run["derived"]["seq_len"]


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone."""

    runs: list[Pretraining]

    @property
    def label(self) -> str:
        """The name of its only run, or of its first and how many there are."""
        return self.runs[0].label + (f" (mean of {len(self.runs)} seeds)" if len(self.runs) > 1 else "")

    @property
    def last_tokens(self) -> int:
        """Tokens of C4 at which all of its runs have been evaluated or passed by."""
        return min(int(run.tokens(run.held_out)[-1]) for run in self.runs)

    def curve(self, key: str, until: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A held-out measure up to `until` tokens of C4, at most `last_tokens`: tokens, means over its runs, standard errors.

        The tokens are those of the first run's evaluations, and `until`; between evaluations runs are taken to be linear. A
        single run has NaN for errors; what was not measured is NaN.
        """
        tokens = np.unique(np.minimum(self.runs[0].tokens(self.runs[0].held_out), until))
        values = [np.interp(tokens, run.tokens(run.held_out), column(run.held_out, key)) for run in self.runs]
        return tokens, *over_runs(np.array(values), np.full((1, len(tokens)), np.nan))


def column(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """One field of the records as float64, NaN for null."""
    return np.array([record[key] for record in records], dtype=np.float64)


def read_pretrainings(folders: Sequence[Path]) -> list[Pretraining]:
    """Read the records of runs as far as they go.

    Raises: FileNotFoundError if there is no run; ValueError if it is of another trainer, or a record cannot be read.
    """
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        run = read_run(folder, MADE_BY)
        train, held_out = (whole_lines(folder / "logs" / file, "step") for file in ("train.jsonl", "eval.jsonl"))
        last_step = max([record["step"] for record in train + held_out], default=0)
        label = name if len(set(names)) == len(names) else str(folder)
        events = whole_lines(folder / "events.jsonl", "event")
        diverged = bool(events) and events[-1]["event"] == "diverged"
        runs.append(Pretraining(folder, label, run, train, held_out, is_finished(folder, last_step, MADE_BY), diverged))
    return runs


def by_setting(runs: Sequence[Pretraining]) -> list[Setting]:
    """The runs with those together that differ in their seed alone, in the order in which the settings come first.

    Runs that began with different trained weights are of different settings, also if only seeds led to these.

    Raises: ValueError if two have the same seed too: they are one run, and would count as two.
    """
    groups = defaultdict(list)
    for run in runs:
        groups[json.dumps(run.settings, sort_keys=True)].append(run)
    for group in groups.values():
        seeds = defaultdict(list)
        for run in group:
            seeds[run.run["args"]["seed"]].append(str(run.folder))
        for seed, of in seeds.items():
            if len(of) > 1:
                raise ValueError(f"{', '.join(of)} have the same settings and --seed {seed}, each run once is needed: pass one")
    return [Setting(group) for group in groups.values()]


def differences(runs: Sequence[Pretraining]) -> list[str]:
    """A line for each setting that differs and is not among those that are compared."""
    lines = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        if name in COMPARED:
            continue
        labels = defaultdict(list)
        for run in runs:
            value = run.settings.get(name)
            if name != "data_dir" or value is not None:  # without synthetic questions there is nothing to differ in
                labels[str(value)].append(run.label)
        if len(labels) > 1:
            of = "; ".join(f"{value} in {', '.join(names)}" for value, names in labels.items())
            lines.append(f"{name} differs, which the comparison includes: {of}")
    return lines
