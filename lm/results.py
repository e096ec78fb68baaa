"""RUN/results.json: what a finished run reached, and what it took."""

import resource
import time
from typing import Any

import torch

from lm.files import write_json
from lm.run import Run


def write_results(run: Run, results: dict[str, Any], begun: float) -> None:
    """Write what was reached, with time and memory of this start of the run, and say it; on the main process.

    Args:
        results: for each split an object with its "perplexity"; anything else beside them.
        begun: when this process began, on the clock of `time.monotonic`.
    """
    if not run.accelerator.is_main_process:
        return
    spent = {"wall_sec": round(time.monotonic() - begun, 1), "num_processes": run.accelerator.num_processes}
    spent["peak_memory_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if run.accelerator.device.type == "cuda":
        spent["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    write_json(run.folder / "results.json", results | spent)
    said = [f"{split} perplexity {of['perplexity']:.4g}" for split, of in results.items() if isinstance(of, dict)]
    run.log.say("  ".join([*said, f"{spent['wall_sec']} s", f"{spent['peak_memory_bytes'] / 2**30:.2f} GiB"]))
