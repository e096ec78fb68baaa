"""How many graph-search examples a second does one process make, in words and as token ids?

    python -m benchmarks.synthetic_generation

On one core, with GPT-NeoX's tokenizer (from samples/tokenizer_neox, else fetch_samples.py's copy for the tests). The peer is
the tokenizer encoding the same examples' whole texts, without the making of them; its ids are the same. Rounds of the three
alternate; the ratio of the medians of the last two is printed, and everything is appended to benchmarks/results.jsonl.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from lm.tokenizer import encode_documents, load_tokenizer
from synthetic import SyntheticExamples, Task

CASES = [(4, 4), (16, 16), (64, 64), (64, 1)]  # max_lookahead, stage
ROUNDS, ROUND_SEC, BATCH = 7, 0.5, 512
TOKENIZERS = [Path("samples/tokenizer_neox"), Path(".cache/test_samples/tokenizer_neox")]


def rate(work: Callable[[int], object]) -> float:
    """Examples a second, over one round of batches."""
    start, examples = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < ROUND_SEC:
        work(examples)
        examples += BATCH
    return examples / elapsed


def compare(examples: SyntheticExamples, tokenizer: PreTrainedTokenizerFast) -> dict:
    """Alternating rounds, after one that compiles."""
    texts = [example["prompt"] + example["answer"] for example in examples.texts(0, BATCH)]
    work: dict[str, Callable[[int], object]] = {
        "texts": lambda first: examples.texts(first, BATCH),
        "ids": lambda first: examples.examples(first, BATCH),
        "tokenizer": lambda _: encode_documents(tokenizer, texts),
    }
    rates: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(ROUNDS + 1):
        for name in work:
            found = rate(work[name])
            if round_number:
                rates[name].append(found)
    medians = {name: statistics.median(rates[name]) for name in work}
    return {
        "benchmark": "synthetic_generation",
        "max_lookahead": examples.task.max_lookahead,
        "max_input_size": examples.task.max_input_size,
        "stage": examples.stage,
        "mean_tokens": round(float(np.mean([len(ids) for ids in examples.examples(0, BATCH).ids])), 1),
        "examples_per_sec": {name: round(median) for name, median in medians.items()},
        "ratio": round(medians["ids"] / medians["tokenizer"], 2),
    }


def main() -> None:
    """Print a row for each case."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else the peer takes all cores
    folder = next((folder for folder in TOKENIZERS if folder.is_dir()), TOKENIZERS[0])
    tokenizer = load_tokenizer(folder)
    print("max_lookahead  stage  mean tokens  texts (examples/s)  ids (examples/s)  tokenizer alone (examples/s)  ratio")
    for max_lookahead, stage in CASES:
        task = Task(max_input_size=6 * max_lookahead, max_lookahead=max_lookahead)
        row = compare(SyntheticExamples(task, seed=0, stage=stage, tokenizer=tokenizer), tokenizer)
        rates = row["examples_per_sec"]
        print(
            f"{max_lookahead:>13}  {stage:>5}  {row['mean_tokens']:>11}  {rates['texts']:>18,}  {rates['ids']:>16,}"
            f"  {rates['tokenizer']:>28,}  {row['ratio']:>5}"
        )
        with open(Path(__file__).parent / "results.jsonl", "a") as file:
            file.write(json.dumps(row | {"timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main()
