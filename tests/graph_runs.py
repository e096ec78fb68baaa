"""Held-out sets of graph search and runs of pptrain.py, small enough to make in a test."""

import hashlib
import json
import signal
from pathlib import Path

from text import byte_level_bpe
from training import flags

import build_data_splits
import pptrain
from lm.args import parse
from lm.checkpoint import Checkpoints
from lm.files import write_sealed
from lm.optim import make_optimizer

TOY = "toy_generator:ToyGenerator"
STAGES = 6
SETTINGS = {  # a look every three steps at the last 30 examples, of which nearly all must be right
    "dirty": True,
    "model": "neox-64x2",
    "precision": "fp32",
    "seq_len": 512,
    "max_steps": 300,
    "effective_batch": 12,
    "micro_batch": 12,
    "lr": 3e-3,
    "warmup_steps": 5,
    "curr_window": 30,
    "curr_check_every": 3,
    "checkpoint_interval_steps": 100,
    "eval_subset_size": 10,
    "log_every": 2,
}
CURRICULUM = SETTINGS | {  # a look every four steps at the last ten examples; each look ends a stage
    "max_steps": 100,
    "micro_batch": 3,
    "curr_window": 10,
    "curr_check_every": 4,
    "curr_threshold": 0.0,
    "checkpoint_interval_steps": 5,
    "log_every": 1,
}


def build(folder: Path, **changes) -> Path:
    """Held-out sets of six stages; returns their folder."""
    sizes = {"eval_size": 20, "test_size": 40, "mixin_size": 5, "num_processes": 1}
    options = {"scratch_dir": folder, "max_input_size": 36, "max_lookahead": STAGES} | sizes | changes
    build_data_splits.main(parse(build_data_splits.Args, flags(**options)))
    return next((folder / "data/nl_splits").glob("mis*"))


def train(folder: Path, data: Path, tokenizer: Path, **changes) -> Path:
    """Run pptrain.main here, which saves the imports; the signal handlers are put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    fixed = {"scratch_dir": folder.parent, "output_dir": folder, "data_dir": data, "tokenizer": tokenizer}
    fixed |= {"force_cpu": True, "num_workers": 0}
    try:
        assert pptrain.main(parse(pptrain.Args, flags(**SETTINGS | fixed | changes))) == 0
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return folder


def write_split(folder: Path, rows: list[dict], split: str = "test") -> Path:
    """A folder of which one split has these rows (`input_text`, `output_texts`), the others none."""
    folder.mkdir(parents=True)
    whole = [{**row, "alpha": 1.0, "stage": STAGES, "seed": 0, "index": index} for index, row in enumerate(rows)]
    files = {}
    for name, content in ({"eval": [], "test": [], "mixin": []} | {split: whole}).items():
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        files[f"{name}.jsonl"] = {"count": len(content), "size": len(text.encode()), "sha256": digest}
    meta = {"format": "splits-2", "max_input_size": 36, "max_lookahead": STAGES}
    meta |= {"generator": {"name": "built-in"}, "files": files, "reachable_lookahead": 4, "mean_prompt_chars": 1.0}
    write_sealed(folder / "meta.json", meta)
    return folder


def write_run(folder: Path, data: Path, model, tokenizer: Path | str = "", **args) -> Path:
    """A run folder as pptrain.py leaves it, with this model as the final one, and as the checkpoint of step 40."""
    checkpoints = Checkpoints(folder / "checkpoints", keep=3)
    checkpoints.save(40, model, make_optimizer("adamw", model, 1e-3, (0.9, 0.999), 1e-8, 0.0), {})
    checkpoints.save_model(folder / "final", model, byte_level_bpe(), {"step": 50})
    checkpoints.wait()
    args = {"data_dir": str(data), "tokenizer": str(tokenizer), "seq_len": 512, "curr_threshold": 0.98} | args
    (folder / "run.json").write_text(json.dumps({"args": args, "derived": {}}))
    return folder
