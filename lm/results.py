"""RUN/results.json: what a finished run reached, and what it took."""

import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from lm.files import read_json, write_json
from lm.run import Run


def loss_and_perplexity(loss: float) -> dict[str, float | None]:
    """Nats per token and their exponential, None where that is beyond all numbers."""
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else None}


def has_results(folder: Path, documents: str | None) -> bool:
    """Whether the run has its results, those of these test files (their digest, or None) among them."""
    if not (folder / "results.json").is_file():
        return False
    results = read_json(folder / "results.json", "pretrain.py")
    return results.get("test", {}).get("documents") == documents


def write_results(run: Run, results: dict[str, Any], begun: float) -> None:
    """Write what was reached, with time and memory of this start of the run on this process, and say it.

    Args:
        results: for each split an object with its "perplexity"; anything else beside them.
        begun: when this process began, on the clock of `time.monotonic`.
    """
    spent = {"wall_sec": round(time.monotonic() - begun, 1), "num_processes": run.accelerator.num_processes}
    spent["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if run.accelerator.device.type == "cuda":
        spent["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    write_json(run.folder / "results.json", results | spent)
    said = [f"{split} perplexity {of['perplexity'] or math.inf:.4g}" for split, of in results.items() if isinstance(of, dict)]
    run.log.say("  ".join([*said, f"{spent['wall_sec']} s", f"{spent['peak_memory_bytes'] / 2**30:.2f} GiB"]))
