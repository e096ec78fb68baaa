"""How fast is a training step, and how much memory does it take, against transformers' Trainer and a plain loop?

    python -m benchmarks.training_step
    python -m benchmarks.training_step --models pythia-160m gpt3-125m --seq_len 2048 --rows 16 --precisions bf16    # on a GPU

The same model, rows of random tokens and AdamW (torch's fused kernel, gradients clipped to 1) in three processes, which take
turns of a few steps each: ours (`lm.session.Session`, as the trainers use it), transformers' Trainer, and the loop of nanoGPT
(github.com/karpathy/nanoGPT, train.py): whole logits, F.cross_entropy, backward. The ratio of the median times of a step is
printed, and that of the peaks of memory, which are the resident set's growth since before the model was built (on a GPU what
torch's allocator had given out). On a GPU also the share of the card's measured matrix rate that the arithmetic of the model
needs: 6 operations for each weight that multiplies and 12 x layers x width x context for attention, for each token (Chowdhery
et al., arXiv 2204.02311, appendix B). Everything is appended to benchmarks/results.jsonl.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lm.args import RunArgs, parse
from lm.models import build_model, on_paper

KINDS = ("ours", "Trainer", "plain loop")
VOCABULARY, LR, BETAS, EPS, DECAY = 50_304, 1e-4, (0.9, 0.95), 1e-8, 0.1
MOST_STEPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Args:
    """What is measured."""

    models: tuple[str, ...] = ("pythia-14m", "pythia-70m")
    """Presets of lm/presets.py."""
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Of the arithmetic."""
    rows: int = 8
    """Sequences in a step."""
    seq_len: int = 512
    """Targets in a sequence."""
    rounds: int = 5
    """Turns of each that are measured, after one that warms up."""
    steps: int = 2
    """Steps of a turn."""
    kind: str = ""
    """What this process does; not for people."""


def data(args: Args) -> torch.Tensor:
    """Rows of tokens."""
    return torch.randint(VOCABULARY, (args.rows, args.seq_len + 1), generator=torch.Generator().manual_seed(0))


def settled() -> None:
    """Return when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Turns:
    """What a child process is told and says: so many steps, how long they took; in the end its peak of memory."""

    def __init__(self) -> None:
        self.before, self.left, self.begun = peak_rss(), 1, None

    def __call__(self) -> None:
        """A step may begin, once those before are enough for a turn and the parent asks for more."""
        self.left -= 1
        if self.left:
            return
        settled()
        if self.begun is not None:
            print(json.dumps({"sec": time.perf_counter() - self.begun}), flush=True)
        steps = sys.stdin.readline().strip()
        if not steps:
            peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss() - self.before
            print(json.dumps({"peak": peak}), flush=True)
            os._exit(0)
        self.left, self.begun = int(steps), time.perf_counter()


def peak_rss() -> int:
    """Of this process until now, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(model_name: str, precision: str, args: Args) -> None:
    """The step of the trainers."""
    from lm.loss import next_token_loss
    from lm.optim import make_optimizer
    from lm.run import open_run, start_accelerator
    from lm.session import Progress, Session

    accelerator, ids = start_accelerator(precision, force_cpu=False), data(args)
    turns = Turns()
    model = build_model(model_name, VOCABULARY, args.seq_len)
    optimizer = make_optimizer("adamw", model, LR, BETAS, EPS, DECAY)
    with tempfile.TemporaryDirectory() as folder:
        own = RunArgs(output_dir=folder, precision=precision, checkpoint_interval_steps=2**40, dirty=True, deterministic=False)
        with open_run(own, {"total_steps": MOST_STEPS}, accelerator) as run:
            session = Session(own, run, model, optimizer, next_token_loss, ids, Progress(), {})
            while True:
                turns()
                rows = ids.to(accelerator.device, non_blocking=True)
                session.make_step([rows], rows[:, 1:].numel(), LR, 1.0, lambda: None, look=False)


def trainer(model_name: str, precision: str, args: Args) -> None:
    """transformers' own."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class AtEachStep(TrainerCallback):
        def on_step_begin(self, *_args: object, **_more: object) -> None:
            turns()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return args.rows * MOST_STEPS

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            row = ids[number % args.rows, :-1]
            return {"input_ids": row, "labels": row}

    ids = data(args)
    turns = Turns()
    model = build_model(model_name, VOCABULARY, args.seq_len)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            max_steps=MOST_STEPS,
            per_device_train_batch_size=args.rows,
            bf16=precision == "bf16",
            use_cpu=not torch.cuda.is_available(),
            optim="adamw_torch_fused",
            learning_rate=LR,
            weight_decay=DECAY,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model=model, args=options, train_dataset=Rows(), callbacks=[AtEachStep()]).train()


def plain_loop(model_name: str, precision: str, args: Args) -> None:
    """As in nanoGPT."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = data(args).to(device)
    turns = Turns()
    model = build_model(model_name, VOCABULARY, args.seq_len).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    while True:
        turns()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.size(-1)), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class Child:
    """A process that makes steps of one kind when it is asked to."""

    def __init__(self, kind: str, model: str, precision: str, rows: int, seq_len: int, **environment: str):
        shape = [f"--kind={kind}", "--models", model, "--precisions", precision, f"--rows={rows}", f"--seq_len={seq_len}"]
        command = [sys.executable, "-m", "benchmarks.training_step", *shape]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.command, self.process = command, subprocess.Popen(command, env=os.environ | environment, **pipes)

    def ask(self, steps: int) -> None:
        """Have it make so many steps."""
        print(steps, file=self.process.stdin, flush=True)

    def answer(self, name: str) -> float:
        """What it says next of this."""
        for line in self.process.stdout:
            if line.startswith(f'{{"{name}"'):
                return json.loads(line)[name]
        raise RuntimeError(f"{' '.join(self.command)} ended without an answer: see above")

    def end(self) -> float:
        """End it; returns its peak of memory in bytes."""
        self.process.stdin.close()
        peak = self.answer("peak")
        self.process.wait()
        return peak


def measure(model: str, precision: str, args: Args) -> dict:
    """All kinds in turns, each in a process of its own."""
    children = {kind: Child(kind, model, precision, args.rows, args.seq_len) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(args.rounds + 1):
        for kind, child in children.items():
            child.ask(args.steps)
            took = child.answer("sec") / args.steps
            if number:
                times[kind].append(took)
    peaks = {kind: child.end() for kind, child in children.items()}
    sec = {kind: statistics.median(times[kind]) for kind in KINDS}
    tokens = args.rows * args.seq_len
    return {
        "benchmark": "training_step",
        "model": model,
        "precision": precision,
        "rows": [args.rows, args.seq_len],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "sec": {kind: round(of, 4) for kind, of in sec.items()},
        "tokens_per_sec": {kind: round(tokens / of) for kind, of in sec.items()},
        "peak_gb": {kind: round(peak / 1e9, 3) for kind, peak in peaks.items()},
        "faster": {kind: round(sec[kind] / sec["ours"], 2) for kind in KINDS[1:]},
        "memory": {kind: round(peaks["ours"] / peaks[kind], 2) for kind in KINDS[1:]},
        "mfu": {
            kind: round(operations(model, args.seq_len) * tokens / of / matrix_rate(precision), 3) for kind, of in sec.items()
        },
    }


def operations(model: str, seq_len: int) -> float:
    """For one token, forward and backward, as PaLM counts them."""
    built = on_paper(model, VOCABULARY, seq_len)
    multiplied = sum(parameter.numel() for parameter in built.parameters() if parameter.ndim > 1)
    if built.get_output_embeddings().weight is not (table := built.get_input_embeddings().weight):
        multiplied -= table.numel()
    return 6 * multiplied + 12 * built.config.num_hidden_layers * built.config.hidden_size * seq_len


def matrix_rate(precision: str) -> float:
    """Operations a second of this machine in a large product of matrices."""
    size, device = (8192, "cuda") if torch.cuda.is_available() else (2048, "cpu")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        settled()
        begun = time.perf_counter()
        a @ b
        settled()
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)


def main(args: Args) -> None:
    """Print a row for each model and precision."""
    if args.kind:
        {"ours": ours, "Trainer": trainer, "plain loop": plain_loop}[args.kind](args.models[0], args.precisions[0], args)
    print(
        "model         precision  tokens/s: ours   Trainer  plain loop   faster than    memory of        share of matrix rate"
    )
    print("                                                                Trainer  loop  Trainer  loop   ours  Trainer  loop")
    for model in args.models:
        for precision in args.precisions:
            row = measure(model, precision, args)
            rates, faster, memory, mfu = (list(row[key].values()) for key in ("tokens_per_sec", "faster", "memory", "mfu"))
            print(
                f"{model:<12}  {precision:<9}  {rates[0]:>14,}  {rates[1]:>8,}  {rates[2]:>10,}  {faster[0]:>7}  {faster[1]:>4}"
                f"  {memory[0]:>7}  {memory[1]:>4}  {mfu[0]:>5}  {mfu[1]:>7}  {mfu[2]:>4}",
                flush=True,
            )
            with open(Path(__file__).parent / "results.jsonl", "a") as file:
                file.write(json.dumps(row | {"torch": torch.__version__, "timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main(parse(Args))
