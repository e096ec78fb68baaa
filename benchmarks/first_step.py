"""How long is it from the command to the first finished optimizer step, of each trainer and of transformers' Trainer?

    python -m benchmarks.first_step                                    # a quarter of an hour on two cores
    python -m benchmarks.first_step --models neox-64x2 --rounds 5

Every start is a process of its own, on the same abstracts, with the same tokenizer and as many tokens in a step (128): our
trainers as they are called from a shell, and a peer made as transformers' examples/pytorch/language-modeling/run_clm.py is
(load_dataset, map, Trainer), once as it is and once with one evaluation before the first step, as pptrain.py and pretrain.py
make one. All begin with random float32 weights, evaluate on a row or two, and write no text. The peer saves nothing, and finds
its tokenised blocks in the cache of an earlier start; our trainers find their packs, and save a checkpoint of step 0.

The clock runs from just before the process is started until the first record of logs/train.jsonl can be read, or the peer has
said that its step is made; then the process is killed. Starts alternate, after one of each that warms the file cache; ratios
are medians over those of the peer with as many evaluations. A last start of each trainer, not among these, is traced: seconds
of its parts, without those that stand in a row of their own. All is appended to benchmarks/results.jsonl.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SEQ_LEN = 128
TOKENIZERS = {"neox-64x2": 1024}  # vocabulary of a model that has not GPT-NeoX's
PEERS = {"train": "Trainer", "pptrain": "Trainer, evaluating", "pretrain": "Trainer, evaluating"}
PARTS = {  # what a start is made of: functions and classes as module:name, or module:class:method
    "processes": ["lm.run:start_accelerator"],
    "data": ["lm.shards:Pack", "lm.papers:read_papers", "lm.splits:open_splits", "lm.splits:identify", "lm.splits:read_rows"],
    "tokenizer": ["lm.tokenizer:load_tokenizer", "lm.tokenizer:fingerprint"],
    "examples": [
        "lm.graph_tokens:check_tokenizer",
        "lm.graph_tokens:Encoder",
        "lm.mixed_rows:MixedRows:check_synthetic",
        "synthetic:share_too_long",
        "lm.heldout:encode_subset",
    ],
    "estimate": ["pretrain:reckon"],
    "model": ["lm.models:build_model"],
    "its checks": ["lm.models:_check_causal", "lm.packing:sees_only_itself"],
    "git": ["lm.provenance:read_tree"],
    "run.json": ["lm.run:_write_provenance"],
    "session": ["lm.session:Session", "lm.trainer_args:optimizer_of"],
    "settle": ["lm.step:settle"],
    "checkpoint": ["lm.session:Session:resume"],
    "evaluation": ["lm.measure:mean_loss", "lm.heldout:teacher_forced"],
    "step": ["lm.session:Session:make_step"],
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is measured."""

    models: tuple[str, ...] = ("neox-64x2", "pythia-160m")
    """Presets of lm/presets.py."""
    rounds: int = 5
    """Measured starts of each."""
    samples: Path = ROOT / "samples"
    """Folder that fetch_samples.py wrote."""


def run(folder: Path, *command: object) -> None:
    """One of our scripts to its end, what it says into a file."""
    with open(folder / "made.out", "a") as out:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment(), stdout=out, stderr=out, check=True)


def environment() -> dict[str, str]:
    """That of a user who is not connected, and whose Python keeps what it compiled."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def make_data(folder: Path, samples: Path, model: str) -> None:
    """Held-out examples, tokenizer, papers and pack for this model."""
    folder.mkdir()
    sizes = ("--eval_size", 500, "--test_size", 500, "--mixin_size", 500)
    run(folder, "build_data_splits.py", "--scratch_dir", folder, "--max_input_size", 12, "--max_lookahead", 2, *sizes)
    next((folder / "data/nl_splits").glob("mis*")).rename(folder / "splits")
    text, tokenizer = samples / "pubmed/train.jsonl", folder / "tokenizer"
    if model in TOKENIZERS:
        made_of = ("--input", folder / "splits/mixin.jsonl", text, "--column", "input_text", "text")
        run(folder, "train_tokenizer.py", *made_of, "--vocab_size", TOKENIZERS[model], "--output_dir", tokenizer)
    else:
        shutil.copytree(samples / "tokenizer_neox", tokenizer)
    held_out = ("--held_out_documents", samples / "pubmed/validation.jsonl", "--seq_len", SEQ_LEN)
    run(folder, "build_pretrain.py", "--scratch_dir", folder, "--documents", text, *held_out, "--tokenizer", tokenizer)
    papers = ("--full_dataset", "--output_dir", folder / "papers")
    run(folder, "fetch_arxiv.py", "--dataset", samples / "pubmed", "--tokenizer", tokenizer, *papers)


def options(trainer: str, model: str, data: Path, rows: int = 1, steps: int = 3) -> list[str]:
    """The arguments of a few steps of rows of 128 tokens (pptrain.py: twice as many examples), all but the run's folder."""
    same = ["--dirty", "--force_cpu", "--precision", "fp32", "--model", model]
    batch = ["--micro_batch", str(rows), "--effective_batch", str(rows)]
    examples = ["--micro_batch", str(2 * rows), "--effective_batch", str(2 * rows)]
    graphs = ["--scratch_dir", str(data), "--data_dir", str(data / "splits"), "--log_every", "1"]
    own = {
        "train": [*batch, "--K", "4", "--data_dir", str(data / "papers"), "--token_budget", str(steps * rows * SEQ_LEN)],
        "pptrain": [*graphs, *examples, "--tokenizer", str(data / "tokenizer"), "--max_steps", str(steps)],
        "pretrain": [*graphs, *batch, "--pptrain_checkpoint", "none", "--total_steps", str(steps), "--sample_every", "0"],
    }
    own["train"] += ["--sequence_length", str(SEQ_LEN)]
    own["pptrain"] += ["--seq_len", str(SEQ_LEN), "--eval_subset_size", "2"]
    own["pretrain"] += ["--eval_blocks", "1", "--eval_subset_size", "1"]
    return [*same, *own[trainer]]


def seconds(command: list[str], made: Callable[[], bool], out: Path) -> float:
    """From just before the process is started until its first step is made. Raises: RuntimeError if it ends before."""
    with open(out, "w") as file:
        begun = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=file, stderr=file, start_new_session=True)
        try:
            while not made():
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(command)} ended before its first step: {out.read_text()[-3000:]}")
                time.sleep(0.005)
            return time.perf_counter() - begun
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def start(name: str, model: str, data: Path) -> float:
    """One start of a trainer of ours, or of the peer."""
    with tempfile.TemporaryDirectory(dir=data) as scratch:
        folder, out = Path(scratch) / "run", Path(scratch) / "out"
        if name in PEERS:
            command = [sys.executable, f"{name}.py", *options(name, model, data), "--output_dir", str(folder)]
            log = folder / "logs/train.jsonl"
            return seconds(command, lambda: log.exists() and log.read_bytes().endswith(b"\n"), out)
        call = f"from benchmarks import first_step; first_step.peer({model!r}, {str(data)!r}, {'eval' in name})"
        return seconds([sys.executable, "-c", call], lambda: "a step is made" in out.read_text(), out)


def peer(model: str, data: str, evaluate: bool) -> None:
    """What run_clm.py does, in a process of its own; its first step ends in a line on the screen."""
    from itertools import chain

    from datasets import load_dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    class Say(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            print("a step is made", flush=True)

    arguments = TrainingArguments(
        output_dir=f"{data}/peer",
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=3,
        eval_on_start=evaluate,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    set_seed(arguments.seed)
    files = json.loads(Path(data, "texts.json").read_text())
    raw = load_dataset("json", data_files=files, cache_dir=f"{data}/cache")
    tokenizer = AutoTokenizer.from_pretrained(f"{data}/tokenizer", trust_remote_code=False)
    config = AutoConfig.from_pretrained(f"{data}/{model}", trust_remote_code=False)
    built = AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    def tokenize(rows):
        return tokenizer(rows["text"])

    def group(rows):
        joined = {name: list(chain(*rows[name])) for name in rows}
        total = len(joined["input_ids"]) // SEQ_LEN * SEQ_LEN
        blocks = {name: [ids[i : i + SEQ_LEN] for i in range(0, total, SEQ_LEN)] for name, ids in joined.items()}
        return blocks | {"labels": blocks["input_ids"].copy()}

    tokenized = raw.map(tokenize, batched=True, remove_columns=raw["train"].column_names)
    blocks = tokenized.map(group, batched=True)
    trainer = Trainer(
        model=built,
        args=arguments,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"].select(range(2)),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[Say()],
    )
    trainer.train()


def trace(name: str, model: str, data: Path) -> dict[str, float]:
    """Seconds of each part of one start."""
    with tempfile.TemporaryDirectory(dir=data) as scratch:
        given = [*options(name, model, data), "--output_dir", f"{scratch}/run"]
        call = f"import time; begun = {time.time()!r}; from benchmarks import first_step; "
        call += f"first_step.traced({name!r}, {given!r}, {scratch + '/parts.json'!r}, begun)"
        out = subprocess.run([sys.executable, "-c", call], cwd=ROOT, env=environment(), capture_output=True, text=True)
        if out.returncode:
            raise RuntimeError(f"the traced start of {name}.py failed: {out.stderr[-3000:]}")
        return json.loads(Path(scratch, "parts.json").read_text())


def traced(name: str, given: list[str], result: str, begun: float) -> None:
    """Start a trainer in this process with clocks around the functions of PARTS, and end with the record of its first step."""
    import importlib
    import inspect

    trainer = importlib.import_module(name)
    from lm.args import parse
    from lm.runlog import RunLog

    imports = time.time() - begun
    spent, inner = dict.fromkeys(PARTS, 0.0), [0.0]

    def clocked(part: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            before = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - before
                spent[part] += took - inner.pop()
                inner[-1] += took

        return call

    def put_in_place(part: str, module: str, name: str, method: str = "__init__") -> None:
        original = getattr(sys.modules.get(module), name, None)  # None: this trainer does not use it
        if inspect.isclass(original):
            setattr(original, method, clocked(part, getattr(original, method)))
            return
        for other in list(sys.modules.values()):  # wherever it was imported by its name
            if original is not None and getattr(other, "__dict__", {}).get(name) is original:
                setattr(other, name, clocked(part, original))

    def end(*_args, **_kwargs):
        whole = time.time() - begun
        found = {"imports": imports} | spent
        Path(result).write_text(json.dumps(found | {"the rest": whole - sum(found.values()), "all": whole}))
        os._exit(0)

    for part, functions in PARTS.items():
        for function in functions:
            put_in_place(part, *function.split(":"))
    RunLog.train = end
    sys.argv = [f"{name}.py", *given]
    trainer.main(parse(trainer.Args, given))
    raise RuntimeError("the trainer ended without a record")


def prepare_peer(model: str, data: Path, samples: Path) -> None:
    """The texts, and the configuration of the model that our trainers build."""
    names = {"train": "train.jsonl", "validation": "validation.jsonl"}
    texts = {split: str((samples / "pubmed" / name).resolve()) for split, name in names.items()}
    (data / "texts.json").write_text(json.dumps(texts))
    build = f"on_paper({model!r}, len(load_tokenizer({str(data / 'tokenizer')!r})), {SEQ_LEN})"
    build += f".config.save_pretrained({str(data / model)!r})"
    run(data, "-c", f"from lm.models import on_paper; from lm.tokenizer import load_tokenizer; {build}")


def measure(args: Args, model: str, data: Path) -> dict:
    """All starts of one model."""
    names = [*PEERS, *dict.fromkeys(PEERS.values())]
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds + 1):
        for name in names:
            took = start(name, model, data)
            print(f"{model:>12}  {name:<20} {took:6.2f} s{'' if number else '  (warms up)'}", flush=True)
            if number:
                times[name].append(took)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "benchmark": "first_step",
        "model": model,
        "sec": {name: round(median, 2) for name, median in medians.items()},
        "range": {name: [round(min(found), 2), round(max(found), 2)] for name, found in times.items()},
        "ratio": {name: round(medians[name] / medians[PEERS[name]], 2) for name in PEERS},
        "parts": {name: {part: round(took, 2) for part, took in trace(name, model, data).items()} for name in PEERS},
    }


def say(row: dict) -> None:
    """A row of the table for each trainer, and one for each of its parts."""
    print(f"\n{row['model']:<12}  seconds to the first step (least, most)    peer   ratio")
    for name, peer_name in PEERS.items():
        sec, least_most = row["sec"], "({}, {})".format(*row["range"][name])
        print(f"{name:<12}  {sec[name]:>10.2f}  {least_most:>27}  {sec[peer_name]:>6.2f}  {row['ratio'][name]:>6.2f}")
    print("\n" + "".join(f"{name:>12}" for name in ["", *PEERS]))
    for part in row["parts"]["train"]:
        print(f"{part:>12}" + "".join(f"{row['parts'][name][part]:>12.2f}" for name in PEERS))


def main(args: Args) -> None:
    """Print two tables for each model."""
    if not (args.samples / "pubmed/train.jsonl").is_file():
        raise FileNotFoundError(f"no {args.samples}/pubmed/train.jsonl: run fetch_samples.py, or pass --samples")
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            data = Path(folder) / model
            make_data(data, args.samples, model)
            prepare_peer(model, data, args.samples)
            row = measure(args, model, data) | {"load_average": [round(load, 2) for load in os.getloadavg()]}
            say(row)
            with open(Path(__file__).parent / "results.jsonl", "a") as file:
                file.write(json.dumps(row | {"timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    from lm.args import parse  # the peer's process imports this file, and should not pay for it

    main(parse(Args))
