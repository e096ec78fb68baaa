"""How long does a checkpoint hold training up, beside the `torch.save` that a script would wait for?

    python -m benchmarks.checkpoint_stall
    python -m benchmarks.checkpoint_stall --rows 16 --seq_len 2048 --precision bf16      # on a GPU

One run (the Session of the trainers, AdamW, one process) makes intervals of equally many steps, in turn: without a checkpoint,
with one that is written in the background, with one that the run waits for until it is read back and named, and with a
`torch.save` of the same weights and moments, neither synced, nor hashed, nor read back. All are saved at the end of the
interval's first step. The wait is how much longer that step takes than the median step without a checkpoint; the stall is how
much longer the whole interval takes than that of the same round without, so that steps which the writing slows down count too.
Both are in median steps, the stall is the median over rounds, and so are the ratios, to what torch.save costs. With
OMP_NUM_THREADS=1 on two cores, one is free for the writing, as beside a GPU. Appended to benchmarks/results.jsonl.
"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lm.args import RunArgs, parse
from lm.loss import next_token_loss
from lm.models import build_model, num_parameters
from lm.optim import make_optimizer
from lm.run import open_run, start_accelerator
from lm.session import Progress, Session

KINDS = ("none", "background", "blocking", "torch.save")


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is measured."""

    model: str = "pythia-70m"
    """Preset of lm/models.py."""
    rows: int = 1
    """Sequences in a step."""
    seq_len: int = 128
    """Targets in a sequence."""
    interval: int = 12
    """Steps of an interval; the background write must be done within one."""
    rounds: int = 5
    """Measured intervals of each kind, after one of each that warms up."""
    precision: str = "fp32"
    """fp32 or bf16."""
    folder: str | None = None
    """Where to write; a new temporary folder by default. Another disk, another stall."""


def interval_seconds(session: Session, ids: torch.Tensor, steps: int, kind: str) -> tuple[list[float], bool]:
    """The time of each step of one interval, and whether all was written at its end."""
    times, targets = [], ids[:, 1:].numel()
    for number in range(steps):
        start = time.perf_counter()
        session.make_step([ids], targets, 1e-4, 1.0, lambda: None)
        saving = number == 0
        if session.stop_while_waiting():
            raise SystemExit("stopped")
        session.end_step(done=saving and kind in ("background", "blocking"))  # a run that is done saves, whatever its interval
        if saving and kind == "blocking":
            session.checkpoints.wait()
        if saving and kind == "torch.save":
            state = {
                "model": session.model.state_dict(),
                "optimizer": session.optimizer.state_dict(),
                "step": session.progress.step,
            }
            torch.save(state, session.run.folder / "checkpoint.pt")
        times.append(time.perf_counter() - start)
    return times, session.checkpoints.idle()


def measure(args: Args, folder: Path) -> dict:
    """All rounds."""
    accelerator = start_accelerator(args.precision, force_cpu=False)
    torch.manual_seed(0)
    model = build_model(args.model, 50_304, args.seq_len)
    run_args = RunArgs(
        output_dir=str(folder), precision=args.precision, checkpoint_interval_steps=2**40, max_step_checkpoints=1, dirty=True
    )
    ids = torch.randint(50_304, (args.rows, args.seq_len + 1)).to(accelerator.device)
    times: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    with open_run(run_args, {"total_steps": None}, accelerator) as run:
        session = Session(
            run_args,
            run,
            model,
            make_optimizer("adamw", model, 1e-4, (0.9, 0.95), 1e-8, 0.1),
            next_token_loss,
            ids,
            Progress(),
            {},
        )
        session.resume()
        session.checkpoints.wait()
        for number in range(args.rounds + 1):
            for kind in KINDS:
                os.sync()  # what torch.save has left to be written must not be written beside another's steps
                took, written = interval_seconds(session, ids, args.interval, kind)
                if not written:
                    raise RuntimeError(f"the write was not done after {args.interval} steps: raise --interval")
                if number:
                    times[kind].append(took)
                    print(f"{kind:>10}  first step {took[0]:6.2f} s, all {sum(took):6.2f} s", flush=True)
        files = session.checkpoints.paths()[-1].iterdir()
        written_bytes = sum(file.stat().st_size for file in files)
        run.close()
    step = statistics.median(sec for took in times["none"] for sec in took)
    waits = {kind: statistics.median(took[0] for took in times[kind]) / step - 1 for kind in KINDS}
    stalls = {
        kind: [(sum(took) - sum(without)) / step for took, without in zip(times[kind], times["none"], strict=True)]
        for kind in KINDS
    }
    medians = {kind: statistics.median(found) for kind, found in stalls.items()}
    return {
        "benchmark": "checkpoint_stall",
        "model": args.model,
        "rows": [args.rows, args.seq_len],
        "device": torch.cuda.get_device_name()
        if accelerator.device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "parameters": num_parameters(model),
        "written_gb": round(written_bytes / 1e9, 3),
        "step_sec": round(step, 4),
        "wait_steps": {kind: round(found, 2) for kind, found in waits.items()},
        "stall_steps": {kind: round(found, 2) for kind, found in medians.items()},
        "stall_range": {kind: [round(min(found), 2), round(max(found), 2)] for kind, found in stalls.items()},
        "ratio": {
            "wait": round(waits["background"] / waits["torch.save"], 2),
            "stall": round(medians["background"] / medians["torch.save"], 2),
        },
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def main(args: Args) -> None:
    """Print a row for each way to save."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = measure(args, Path(folder))
    print(f"{row['model']}, rows {row['rows']}, {row['device']}: {row['written_gb']} GB, a step takes {row['step_sec']} s")
    print("            wait (steps)  stall (steps)  least and most of a round")
    for kind in KINDS:
        print(f"{kind:>10}  {row['wait_steps'][kind]:>12}  {row['stall_steps'][kind]:>13}  {row['stall_range'][kind]}")
    print("of torch.save's, in the background: wait {wait}, stall {stall}".format(**row["ratio"]))
    with open(Path(__file__).parent / "results.jsonl", "a") as file:
        file.write(json.dumps(row | {"torch": torch.__version__, "timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main(parse(Args))
