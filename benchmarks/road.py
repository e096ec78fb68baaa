"""Does a step wait for its rows? Milliseconds that each trainer spends on getting them, of those that a step takes.

    python -m benchmarks.road

Each trainer makes twelve steps of a small model as it is called from a shell, on the data of `benchmarks.first_step` (papers,
graphs, a pack of text with graphs among it), and traces five of them (--profile). What waits for rows, sends them to a device
or is neither pass nor update stands in a column of its own. Appended to benchmarks/results.jsonl; how fast
text becomes shards, examples are made and checkpoints are written is in `benchmarks.packing`, `synthetic_generation` and
`checkpoint_stall`, and `benchmarks.table` shows all of it together.
"""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import first_step
from lm.args import parse

STEPS = 12
SHOWN = ("data", "to_device", "log", "other")
MIXED = ("--mixin_percent", "0.25")


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is measured."""

    model: str = "pythia-14m"
    """Preset of lm/presets.py."""
    rows: int = 8
    """Rows of 128 tokens in a step; twice as many examples of graphs."""
    samples: Path = first_step.ROOT / "samples"
    """Folder that fetch_samples.py wrote."""


def profile(trainer: str, args: Args, data: Path) -> dict:
    """What the trainer's own profile says."""
    given = first_step.options(trainer, args.model, data, args.rows, STEPS)
    given += [*(MIXED if trainer == "pretrain" else ()), "--profile", "--output_dir", str(data / trainer)]
    first_step.run(data, f"{trainer}.py", *given)
    return json.loads((data / trainer / "profile/profile.json").read_text())


def main(args: Args) -> None:
    """Print a row for each trainer."""
    print("trainer    step (ms)" + "".join(f"{name:>12}" for name in SHOWN))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        first_step.make_data(data, args.samples, args.model)
        for trainer in first_step.PEERS:
            found = profile(trainer, args, data)
            ms = {part["part"]: round(part["ms"], 2) for part in found["parts"]}
            print(f"{trainer:<9}  {found['step_ms']:>9.1f}" + "".join(f"{ms[name]:>12.2f}" for name in SHOWN), flush=True)
            row = {"benchmark": "road", "trainer": trainer, "model": args.model, "rows": [args.rows, first_step.SEQ_LEN]}
            row |= {"step_ms": round(found["step_ms"], 1), "ms": ms, "timestamp": time.time()}
            with open(Path(__file__).parent / "results.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(parse(Args))
