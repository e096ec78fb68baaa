"""How much faster is a pre-pretraining step whose examples are packed into rows than one that pads them?

    python -m benchmarks.packed_step

One forward and backward pass and update of a pythia-14m on one core, over the same 8 examples of one of 64 stages, with
GPT-NeoX's tokenizer. The peers give each example a row of its own, with an attention mask and whole logits: as long as the
longest of the micro-batch, as the published script does (github.com/JimmyJamJr/nl-fine-tuning), and as long as seq_len,
2,048, which keeps shapes the same from step to step, as compiled models like it. The weights of the targets are ours: of all,
or, as with --loss answer_only, of the answers alone, which then alone get logits. Rounds alternate; the ratios of the medians
are printed, and everything is appended to benchmarks/results.jsonl.
"""

import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.synthetic_generation import TOKENIZERS
from lm.loss import packed_loss
from lm.models import build_model
from lm.optim import make_optimizer
from lm.packing import Batch, Loss, attention_reach, pack
from lm.tokenizer import load_tokenizer
from synthetic import SyntheticExamples, Task

TASK, SEQ_LEN, MICRO_BATCH, ROUNDS = Task(max_input_size=384, max_lookahead=64), 2048, 8, 3
CASES = ((1, "weighted"), (8, "weighted"), (32, "weighted"), (32, "answer_only"))  # stage and loss
TO_SEQ_LEN = (1,)  # the slowest peer needs 10 GB and half a minute whatever the stage


def widened(batch: Batch) -> Batch:
    """The same rows, padded to seq_len."""
    more = SEQ_LEN - batch["input_ids"].shape[1]
    fill = {"example": len(batch["lengths"])}
    rows = {name: values for name, values in batch.items() if values.ndim == 2}
    return batch | {name: F.pad(values, (0, more), value=fill.get(name, 0)) for name, values in rows.items()}


def padded_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The same sum of losses, of rows of one example each, from whole logits."""
    mask = (batch["example"] < len(batch["lengths"])).long()
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False).logits
    nats = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    return (nats * batch["weights"].flatten()).sum()


def seconds(model: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str, batch: Batch) -> float:
    """Of one step."""
    start = time.perf_counter()
    total = packed_loss(model, batch)[0] if name == "packed" else padded_loss(model, batch)
    (total / batch["weights"].sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def compare(stage: int, loss: Loss, model, optimizer, tokenizer) -> dict:
    """Alternating rounds, after one that warms up."""
    made = SyntheticExamples(TASK, 0, stage, tokenizer=tokenizer).examples(0, MICRO_BATCH)
    batches = {
        "packed": pack(made.ids, made.answer_tokens, loss, attention_reach(model)),
        "padded": pack(made.ids, made.answer_tokens, loss, None),
    }
    if stage in TO_SEQ_LEN:
        batches["padded to seq_len"] = widened(batches["padded"])
    times: dict[str, list[float]] = {name: [] for name in batches}
    for round_number in range(ROUNDS + 1):
        for name, batch in batches.items():
            took = seconds(model, optimizer, name, batch)
            if round_number:
                times[name].append(took)
    medians = {name: statistics.median(times[name]) for name in batches}
    return {
        "benchmark": "packed_step",
        "stage": stage,
        "loss": loss,
        "tokens": int(batches["packed"]["lengths"].sum()),
        "rows": {name: list(batch["input_ids"].shape) for name, batch in batches.items()},
        "sec": {name: round(median, 3) for name, median in medians.items()},
        "ratio": {name: round(median / medians["packed"], 2) for name, median in medians.items() if name != "packed"},
    }


def main() -> None:
    """Print a row for each stage."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(next(folder for folder in TOKENIZERS if folder.is_dir()))
    torch.manual_seed(0)
    model = build_model("pythia-14m", len(tokenizer), SEQ_LEN)
    optimizer = make_optimizer("adamw", model, 5e-4, (0.9, 0.999), 1e-6, 0.1)
    print("stage         loss  tokens  rows x targets, packed  packed (s)  padded (s)  ratio  padded to seq_len (s)  ratio")
    for stage, loss in CASES:
        row = compare(stage, loss, model, optimizer, tokenizer)
        sec, ratio, shape = row["sec"], row["ratio"], row["rows"]["packed"]
        print(
            f"{stage:>5}  {loss:>11}  {row['tokens']:>6}  {shape[0]:>10} x {shape[1]:>9}  {sec['packed']:>10}"
            f"  {sec['padded']:>10}  {ratio['padded']:>5}"
            f"  {sec.get('padded to seq_len', '-'):>21}  {ratio.get('padded to seq_len', '-'):>5}",
            flush=True,
        )
        with open(Path(__file__).parent / "results.jsonl", "a") as file:
            file.write(json.dumps(row | {"torch": torch.__version__, "timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main()
