"""How much faster does build_pretrain.py turn JSON Lines into shards than Hugging Face's tokenizers and datatrove do?

    python -m benchmarks.packing           # wants samples/ (fetch_samples.py); makes an environment for datatrove in .cache

The corpus is real: the PubMed abstracts of samples/, and the Python, Markdown and text files of the packages installed here,
each once, in documents of at most 8,000 characters, in eight files. The peers have the same files, tokenizer (GPT-NeoX's) and
number of processes or threads, and write uint16 with EOS after each document: a loop over batches of `encode_batch_fast`, and
datatrove 0.10.1's JsonlReader and DocumentTokenizer (without its merging step). Whole commands are timed, start-up and all, in
turns; the ratios of the medians of tokens per second are printed, and everything is appended to benchmarks/results.jsonl.
"""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from lm.files import read_json

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "packing"
TOKENIZER = ROOT / "samples/tokenizer_neox"
CORPUS_BYTES, FILES, DOCUMENT_CHARACTERS = 300 * 10**6, 8, 8000
PROCESSES = len(os.sched_getaffinity(0))
ROUNDS = 3
DATATROVE = ["datatrove==0.10.1", "xxhash<4", "tokenizers==0.23.3", "orjson"]

BATCHES = """
import json, sys
from pathlib import Path
import numpy as np
from tokenizers import Tokenizer

corpus, tokenizer, out = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)
eos = tokenizer.token_to_id("<|endoftext|>")

def write(texts):
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        file.write(np.array([*encoding.ids, eos], np.uint16).tobytes())

with open(out, "wb") as file:
    batch = []
    for path in sorted(Path(corpus).glob("*.jsonl")):
        for line in open(path):
            batch.append(json.loads(line)["text"])
            if len(batch) == 1000:
                write(batch)
                batch = []
    write(batch)
"""
PIPELINE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer

if __name__ == "__main__":
    corpus, tokenizer, out, processes = sys.argv[1:]
    steps = [
        JsonlReader(corpus, glob_pattern="*.jsonl"),
        DocumentTokenizer(out, tokenizer, eos_token="<|endoftext|>", shuffle_documents=False),
    ]
    LocalPipelineExecutor(steps, tasks=8, workers=int(processes), logging_dir=out + "/logs").run()
"""


def texts() -> Iterator[str]:
    """Real documents, each once."""
    for split in ("train", "validation", "test"):
        with open(ROOT / f"samples/pubmed/{split}.jsonl", encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)
    seen = set()
    for path in sorted(Path(sys.prefix).rglob("*")):
        if path.suffix not in (".py", ".md", ".rst", ".txt") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            parts = (text[start : start + DOCUMENT_CHARACTERS] for start in range(0, len(text), DOCUMENT_CHARACTERS))
            yield from (part for part in parts if part.strip())


def make_corpus() -> tuple[Path, int]:
    """A folder of JSON Lines, and their bytes."""
    folder, size = CACHE / "corpus", 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = [open(folder / f"{number}.jsonl", "w", encoding="utf-8") for number in range(FILES)]  # noqa: SIM115
    for number, text in enumerate(texts()):
        size += files[number % FILES].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        if size > CORPUS_BYTES:
            break
    for file in files:
        file.close()
    return folder, sum(path.stat().st_size for path in folder.iterdir())


def datatrove_python() -> str:
    """An interpreter that has datatrove, in an environment of its own: it does not go with what we pin."""
    folder = CACHE / "datatrove"
    if not (folder / "done").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *DATATROVE], check=True)
        (folder / "done").touch()
    return str(folder / "bin/python")


def commands(corpus: Path, out: Path) -> dict[str, list[str]]:
    """What is compared."""
    ours = [sys.executable, str(ROOT / "build_pretrain.py"), f"--scratch_dir={out}", f"--output_dir={out}/pack"]
    ours += ["--documents", str(corpus), "--tokenizer", str(TOKENIZER), "--held_out_blocks", "1"]
    tokenizer = str(TOKENIZER / "tokenizer.json")
    return {
        "build_pretrain": [*ours, f"--num_workers={PROCESSES}"],
        "batches": [sys.executable, "-c", BATCHES, str(corpus), tokenizer, str(out / "tokens.bin")],
        "datatrove": [datatrove_python(), str(CACHE / "pipeline.py"), str(corpus), tokenizer, str(out), str(PROCESSES)],
    }


def num_tokens(out: Path) -> int:
    """Tokens that were written."""
    if (out / "pack/meta.json").exists():
        meta = read_json(out / "pack/meta.json", "")
        return meta["num_tokens"] + meta["held_out"]["tokens"]
    return sum(path.stat().st_size for path in [*out.glob("tokens.bin"), *out.glob("*.ds")]) // 2


def main() -> None:
    (corpus, size), out, seconds, tokens = make_corpus(), CACHE / "out", {}, {}
    (CACHE / "pipeline.py").write_text(PIPELINE)
    environment = {**os.environ, "RAYON_NUM_THREADS": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    for round_number in range(ROUNDS):
        for name, command in commands(corpus, out).items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            parallel = str(name == "batches").lower()
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment | {"TOKENIZERS_PARALLELISM": parallel})
            seconds.setdefault(name, []).append(time.perf_counter() - start)
            tokens[name] = num_tokens(out)
            print(f"round {round_number}: {name}: {seconds[name][-1]:.1f} s, {tokens[name]:,} tokens", flush=True)
    rates = {name: tokens[name] / statistics.median(times) for name, times in seconds.items()}
    print(f"\n{size / 1e6:.0f} MB of JSON Lines, {PROCESSES} processes")
    print(f"{'':<16}{'tokens/s':>14}{'build_pretrain is faster':>28}")
    for name, rate in rates.items():
        print(f"{name:<16}{rate:>14,.0f}{rates['build_pretrain'] / rate:>27.1f}x")
    record = {
        "benchmark": "packing",
        "processes": PROCESSES,
        "bytes": size,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_sec": {name: round(rate) for name, rate in rates.items()},
        "timestamp": time.time(),
    }
    with open(Path(__file__).with_name("results.jsonl"), "a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
