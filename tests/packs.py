"""Packs of real sentences, as build_pretrain.py leaves them or while it goes on, and runs of pretrain.py on them."""

import signal
from pathlib import Path

import numpy as np
from text import documents
from training import flags
from transformers import PreTrainedTokenizerFast

import pretrain
from lm.args import parse
from lm.files import listed, read_sealed, sha256, write_sealed
from lm.packer import new_state
from lm.shards import totals
from lm.tokenizer import encode_documents, fingerprint, token_dtype

SEQ_LEN = 192  # more than any example of the smallest graphs has


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """The documents' ids, each followed by EOS."""
    dtype = token_dtype(len(tokenizer))
    ids = encode_documents(tokenizer, texts)
    return np.concatenate([np.append(part, tokenizer.eos_token_id).astype(dtype) for part in ids])


def write_pack(folder: Path, tokenizer: PreTrainedTokenizerFast, shards: int = 5, per_shard: int = 5, **header) -> Path:
    """A finished pack of `shards` shards of `per_shard` documents (about 1,200 tokens each), and one document held out."""
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder / "tokenizer")
    texts = documents()
    entries = []
    for number in range(shards):
        own = texts[1 + number * per_shard : 1 + (number + 1) * per_shard]
        entries.append(_write(folder, f"shard_{number:05d}.bin", stream(tokenizer, own), len(own)))
    held_out = _write(folder, "held_out.bin", stream(tokenizer, texts[:1]), 1)
    return _seal(folder, tokenizer, entries, held_out, header)


def write_tokens(
    folder: Path, tokenizer: PreTrainedTokenizerFast, shards: list[np.ndarray], held_out: np.ndarray, **header
) -> Path:
    """A finished pack of these tokens, as if each shard were one document."""
    tokenizer.save_pretrained(folder / "tokenizer")
    entries = [_write(folder, f"shard_{number:05d}.bin", tokens, min(len(tokens), 1)) for number, tokens in enumerate(shards)]
    return _seal(folder, tokenizer, entries, _write(folder, "held_out.bin", held_out, min(len(held_out), 1)), header)


def _seal(folder: Path, tokenizer: PreTrainedTokenizerFast, entries: list[dict], held_out: dict, header: dict) -> Path:
    whole = {"seq_len": SEQ_LEN, "dtype": token_dtype(len(tokenizer)), "vocab_size": len(tokenizer)}
    whole |= {"eos_token_id": tokenizer.eos_token_id, "source": {"documents": "the Python language reference"}}
    whole |= {"tokenizer": {"fingerprint": fingerprint(tokenizer)}} | header
    state = new_state(whole, held_out | {"first_record": 0}, listed(folder, (folder / "tokenizer").iterdir()), {}) | {
        "shards": entries
    }
    write_sealed(folder / "meta.json", state | totals(state))
    return folder


def _write(folder: Path, name: str, tokens: np.ndarray, documents: int) -> dict:
    tokens.tofile(folder / name)
    counts = {"tokens": len(tokens), "documents": documents, "compared": 0, "differing": 0}
    rest = {"records": [0, documents], "last": True, "encoder": "tests", "left_out": {}, "left_out_at": [], "piece": 0}
    return counts | rest | {"file": name, "sha256": sha256(folder / name)}


def publish(whole: Path, folder: Path, shards: int, finished: bool = False, target_blocks: int | None = None) -> None:
    """Make `folder` what the finished pack `whole` was when it had this many shards; later calls with more let it grow."""
    state = read_sealed(whole / "meta.json", "")
    for entry in state["shards"][shards:]:
        (folder / entry["file"]).unlink(missing_ok=True)
    names = [entry["file"] for entry in [*state["shards"][:shards], state["held_out"]]]
    names += [f"tokenizer/{path.name}" for path in (whole / "tokenizer").iterdir()]
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_bytes((whole / name).read_bytes())
    state |= {"shards": state["shards"][:shards], "target_blocks": target_blocks}
    state |= totals(state)
    write_sealed(folder / "progress.json", state)
    if finished:
        write_sealed(folder / "meta.json", state)
        (folder / "progress.json").unlink()


SETTINGS = {  # checkpoints in the middle of a log interval, and an evaluation at neither
    "dirty": True,
    "total_steps": 24,
    "effective_batch": 6,
    "micro_batch": 3,
    "mixin_percent": 0.25,
    "precision": "fp32",
    "lr": 3e-3,
    "warmup_steps": 4,
    "log_every": 3,
    "eval_every": 8,
    "eval_blocks": 5,
    "eval_subset_size": 5,
    "checkpoint_interval_steps": 5,
}


def pretrain_here(folder: Path, scratch: Path, **changes) -> int:
    """Run pretrain.main here, which saves the imports, and return its code; the signal handlers are put back afterwards."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    options = SETTINGS | {"scratch_dir": scratch, "output_dir": folder, "force_cpu": True} | changes
    try:
        return pretrain.main(parse(pretrain.Args, flags(**options)))
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
