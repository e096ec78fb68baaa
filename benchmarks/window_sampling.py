"""How many training windows a second does one process draw, against nanoGPT's way of drawing them?

    python -m benchmarks.window_sampling

Both read the same memory-mapped file of the real data's size in papers and a fifth of it in tokens, and end with int64
inputs and targets of (micro_batch, sequence_length). Ours is the whole training path: loader, RandomWindowDataset
with papers, weights and vocabulary check, and the conversion that train.py makes on the device. The peer does what
nanoGPT's get_batch does (github.com/karpathy/nanoGPT, train.py): opens the memory map anew, draws positions without looking
at papers, and stacks one int64 copy per row for the inputs and one for the targets. Rounds alternate; the ratio of medians
is printed, and everything is appended to benchmarks/results.jsonl.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from lm.micro_batches import Loader
from lm.papers import Papers
from lm.run import start_accelerator
from random_window_dataset import RandomWindowDataset

NUM_PAPERS, TOKENS_PER_PAPER, VOCABULARY = 33_388, 3_000, 50_277
ROUNDS, ROUND_SEC = 7, 0.5
SHAPES = [(16, 100), (16, 256), (64, 256), (16, 2048)]  # micro_batch, sequence_length


def store(folder: Path) -> Papers:
    """Papers of random tokens in a file of 200 MB."""
    path = folder / "tokens.bin"
    np.random.default_rng(0).integers(VOCABULARY, size=NUM_PAPERS * TOKENS_PER_PAPER, dtype=np.uint16).tofile(path)
    return Papers(
        tokens=np.memmap(path, np.uint16, mode="r").view(np.ndarray),
        paper_ids=[f"train_{i}" for i in range(NUM_PAPERS)],
        category_names=[f"category {i}" for i in range(11)],
        categories=np.arange(NUM_PAPERS) % 11,
        offsets=np.arange(NUM_PAPERS) * TOKENS_PER_PAPER,
        lengths=np.full(NUM_PAPERS, TOKENS_PER_PAPER),
        splits={"train": np.arange(NUM_PAPERS)},
        meta={"vocab_size": VOCABULARY},
        folder=folder,
    )


def ours(papers: Papers, micro_batch: int, sequence_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The training path of train.py."""
    dataset = RandomWindowDataset(papers, "train", sequence_length)
    loader = Loader(dataset.__getitems__, micro_batch, 1, 0, start_accelerator("fp32", force_cpu=True))
    for step in itertools.count():
        ids = loader.step(step)[0].long()
        yield ids[:, :-1], ids[:, 1:]


def nanogpts(papers: Papers, micro_batch: int, sequence_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Its get_batch, on a CPU."""
    while True:
        data = np.memmap(papers.folder / "tokens.bin", dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - sequence_length, (micro_batch,))
        x = torch.stack([torch.from_numpy((data[i : i + sequence_length]).astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy((data[i + 1 : i + 1 + sequence_length]).astype(np.int64)) for i in starts])
        yield x, y


def windows_per_sec(batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Over one round."""
    start, windows = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < ROUND_SEC:
        windows += len(next(batches)[0])
    return windows / elapsed


def compare(papers: Papers, micro_batch: int, sequence_length: int) -> dict:
    """Alternating rounds, after one that warms the page cache."""
    makers: dict[str, Callable] = {"ours": ours, "nanogpt": nanogpts}
    batches = {name: make(papers, micro_batch, sequence_length) for name, make in makers.items()}
    rates: dict[str, list[float]] = {name: [] for name in makers}
    for round_number in range(ROUNDS + 1):
        for name in makers:
            rate = windows_per_sec(batches[name])
            if round_number:
                rates[name].append(rate)
    medians = {name: statistics.median(rates[name]) for name in makers}
    return {
        "benchmark": "window_sampling",
        "micro_batch": micro_batch,
        "sequence_length": sequence_length,
        "windows_per_sec": {name: round(rate) for name, rate in medians.items()},
        "ms_per_micro_batch": round(1000 * micro_batch / medians["ours"], 4),
        "ratio": round(medians["ours"] / medians["nanogpt"], 2),
    }


def main() -> None:
    """Print a row for each shape."""
    torch.set_num_threads(1)
    print("micro_batch  sequence_length  ours (windows/s)  nanoGPT's (windows/s)  ratio  ours (ms per micro-batch)")
    with tempfile.TemporaryDirectory() as folder:
        papers = store(Path(folder))
        for micro_batch, sequence_length in SHAPES:
            row = compare(papers, micro_batch, sequence_length)
            rates = row["windows_per_sec"]
            print(
                f"{micro_batch:>11}  {sequence_length:>15}  {rates['ours']:>16,}  {rates['nanogpt']:>21,}"
                f"  {row['ratio']:>5}  {row['ms_per_micro_batch']:>25}"
            )
            with open(Path(__file__).parent / "results.jsonl", "a") as file:
                file.write(json.dumps(row | {"torch": torch.__version__, "timestamp": time.time()}) + "\n")


if __name__ == "__main__":
    main()
