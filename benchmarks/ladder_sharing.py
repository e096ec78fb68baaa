"""Do small runs make more tokens a second side by side than one after another?

    python -m benchmarks.ladder_sharing
    python -m benchmarks.ladder_sharing --models olmo-4m olmo-8m olmo-20m --runs 1 2 4 8 --seq_len 2048 --rows 32   # on a GPU

The smallest rungs of the OLMo ladder are bound by launches and by the vocabulary, not by matrices. So many processes train the
same model at once (`ladder.py run --per_gpu N`; on CPUs `--workers N`, which share the cores), and the tokens of all of them
together are compared with those of a single one, in alternating rounds. Everything is appended to benchmarks/results.jsonl.
"""

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.training_step import Child
from lm.args import parse


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is measured."""

    models: tuple[str, ...] = ("olmo-4m", "olmo-8m")
    """Presets of lm/presets.py."""
    runs: tuple[int, ...] = (1, 2)
    """Numbers of runs side by side; the first is what others are compared with."""
    precision: str = "bf16"
    """Of the arithmetic."""
    rows: int = 4
    """Sequences in a step."""
    seq_len: int = 512
    """Targets in a sequence."""
    rounds: int = 5
    """Turns that are measured, after one that warms up."""
    steps: int = 4
    """Steps of each run in a turn."""


def turn(children: list[Child], steps: int) -> float:
    """Seconds until each of them has made its steps."""
    begun = time.perf_counter()
    for child in children:
        child.ask(steps)
    for child in children:
        child.answer("sec")
    return time.perf_counter() - begun


def measure(model: str, args: Args) -> dict:
    """All numbers of runs in turns; while one is measured the others wait."""
    cores = len(os.sched_getaffinity(0))
    groups = {}
    for runs in args.runs:
        threads = str(max(1, cores // runs))
        shape = model, args.precision, args.rows, args.seq_len
        groups[runs] = [Child("ours", *shape, OMP_NUM_THREADS=threads) for _ in range(runs)]
    times: dict[int, list[float]] = {runs: [] for runs in args.runs}
    for number in range(args.rounds + 1):
        for runs, children in groups.items():
            took = turn(children, args.steps)
            if number:
                times[runs].append(took)
    for child in (child for children in groups.values() for child in children):
        child.end()
    tokens = args.steps * args.rows * args.seq_len
    rates = {runs: runs * tokens / statistics.median(took) for runs, took in times.items()}
    return {
        "benchmark": "ladder_sharing",
        "model": model,
        "precision": args.precision,
        "rows": [args.rows, args.seq_len],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {cores} cores",
        "tokens_per_sec": {runs: round(rate) for runs, rate in rates.items()},
        "ratio": {runs: round(rate / rates[args.runs[0]], 2) for runs, rate in rates.items()},
    }


def main(args: Args) -> None:
    """Print a row for each model."""
    print("model         " + "".join(f"{f'{runs} at once':>22}" for runs in args.runs))
    for model in args.models:
        row = measure(model, args)
        cells = (f"{rate:,} tokens/s x{row['ratio'][runs]}" for runs, rate in row["tokens_per_sec"].items())
        print(f"{model:<14}" + "".join(f"{cell:>22}" for cell in cells), flush=True)
        with open(Path(__file__).parent / "results.jsonl", "a") as file:
            file.write(json.dumps(row | {"torch": torch.__version__, "timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main(parse(Args))
