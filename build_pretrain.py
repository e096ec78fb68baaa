"""Pack text into token ids for pretrain.py: C4 from the hub, or any files, in shards that can be trained on as they come.

    python build_pretrain.py --scratch_dir S --total_steps 10000 --effective_batch 32                     # C4, streamed
    python build_pretrain.py --scratch_dir S --documents 'texts/*.jsonl.gz' --tokenizer DIR --num_workers 16
    sbatch --array=0-15 scripts/pack_job.sh --scratch_dir S ...              # each task a share; then the same with --join

Every document is packed once, in an order that depends on the files and --seed alone, with EOS after it: the bytes are the same
for any number of workers and tasks. A killed run continues at its last whole shard, and a finished one is made longer, when
the same command is given again. Shards are published as they are finished: pretrain.py may begin on the first.

Reads   a hub dataset (allenai/c4), or --documents (.jsonl, .json, .txt, .md, also .gz or .zst; .parquet) or a --manifest
Writes  OUTPUT_DIR/shard_*.bin, held_out.bin, tokenizer/, progress.json, at the end meta.json (lm/shards.py says what they hold)
"""

import fcntl
import itertools
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from lm.args import below, check, parse
from lm.characters import character_tokenizer, preparation
from lm.corpus import File, digest, find_files, hub_files, read_manifest
from lm.documents import Piece, Reading, cut
from lm.files import listed, locked
from lm.packer import Packer, new_state
from lm.paper_writer import refuse_other
from lm.papers import DTYPES
from lm.piece_packer import Job, PiecePacker
from lm.records import TextUnit
from lm.shards import Pack, read_state, stride, tokens_for
from lm.sources import disk_full
from lm.workers import CONTEXT

DEFAULT_BLOCKS = 320_000  # 10,000 steps of 32
SHOW_EVERY_SEC = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    """Pack one corpus."""

    scratch_dir: str
    """Folder that all of this line of work lives under."""
    output_dir: str = ""
    """Folder of the pack; SCRATCH_DIR/data/c4_packed by default."""

    dataset: str = "allenai/c4"
    """A hub dataset of JSON Lines, Parquet or text files, read as a stream."""
    dataset_config: str = "en"
    """Its configuration."""
    dataset_revision: str | None = None
    """Its branch, tag or commit; what is packed names the commit."""
    split: str = "train"
    """Its split."""
    held_out_split: str = "validation"
    """Its split that the held-out text comes from; "" takes it from the beginning of --split, where it is not packed."""
    documents: tuple[str, ...] = ()
    """Files, folders or patterns instead of the hub dataset."""
    manifest: Path | None = None
    """A file with the path of one file on each line, instead of --documents."""
    held_out_documents: tuple[str, ...] = ()
    """Files of the held-out text; by default it is taken from the beginning of the others, and not packed."""
    text_column: str = "text"
    """Column of JSON Lines and Parquet files that holds the text."""
    text_unit: TextUnit = "file"
    """What one document is in text files."""
    skip_bad_documents: bool = False
    """Leave out, and count, what is no document: damaged files, lines that are not JSON, texts that are not strings."""

    tokenizer: str = "EleutherAI/pythia-160m"
    """A folder with tokenizer.json, or a hub name; fetch_samples.py writes the same one to samples/tokenizer_neox. char: each
    character is a token, of text that is put through Unidecode and lower case (a folder of that name is ./char)."""
    verify: Literal["sample", "all"] = "sample"
    """Documents encoded by Hugging Face's tokenizers too: one of 500 and the first 4 of each piece, or all."""
    seq_len: int = 2048
    """Targets in a block; a block is one token longer."""
    no_overlap: bool = False
    """No token is in two blocks; the first of each is then never a target. By default it is the last of the block before."""
    total_steps: int | None = None
    """Steps to pack for; with none, 10,000 of the hub dataset, or all of --documents."""
    effective_batch: int = 32
    """Blocks in a step."""
    blocks_per_shard: int = 4096
    """A shard ends with the documents that fill so many blocks."""
    held_out_blocks: int = 64
    """Blocks of held-out text."""
    seed: int = 0
    """Decides the order of files and documents."""
    shuffle_window: int = 10_000
    """Documents that are shuffled together, files coming in random order too; 0 keeps the order of the files."""

    num_workers: int = len(os.sched_getaffinity(0))
    """Processes that read and encode."""
    task: int | None = None
    """Pack only this share, 0 to --num_tasks - 1, as a task of a SLURM array does."""
    num_tasks: int = 1
    """Shares in all."""
    join: bool = False
    """Put the shares that tasks have packed together."""

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or Path(self.scratch_dir) / "data" / "c4_packed")

    @property
    def is_local(self) -> bool:
        return bool(self.documents or self.manifest)

    @property
    def target_blocks(self) -> int | None:
        """Blocks to pack; None for all there are."""
        if self.total_steps is not None:
            return self.total_steps * self.effective_batch
        return None if self.is_local else DEFAULT_BLOCKS

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = below(
            self, 1, "seq_len", "total_steps", "effective_batch", "blocks_per_shard", "held_out_blocks", "num_workers"
        )
        found += below(self, 0, "seed", "shuffle_window")
        if not all((*self.documents, *self.held_out_documents)):
            found.append("--documents or --held_out_documents has an empty name: is a variable of the shell not set?")
        if self.documents and self.manifest:
            found.append(f"--documents and --manifest {self.manifest}: pass one of them")
        if self.held_out_documents and not self.is_local:
            found.append("--held_out_documents with a hub dataset: pass --held_out_split, or --documents too")
        if self.task is not None and not 0 <= self.task < self.num_tasks:
            found.append(
                f"--task {self.task} of --num_tasks {self.num_tasks}: a number from 0 to {self.num_tasks - 1} is needed"
            )
        if self.task is None and self.num_tasks != 1:
            found.append(f"--num_tasks {self.num_tasks} without --task: pass which of them this is")
        if self.task is not None and self.join:
            found.append("--task and --join: join when all tasks are done")
        if self.folder.exists() and not self.folder.is_dir():
            found.append(f"{self.folder} is a file, a folder is needed: pass another --output_dir")
        return found


@dataclass(frozen=True)
class Corpus:
    """The files, and what is said about them."""

    files: list[File]
    held_out: list[File]  # empty: from the beginning of the others
    about: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What two packs of the same text have in common."""
        return {"files": digest(self.files), "num_files": len(self.files), "held_out": digest(self.held_out)}


def find_corpus(args: Args) -> Corpus:
    """Look for all files. Raises: FileNotFoundError, ValueError or RuntimeError if there are none, or of an unknown kind."""
    if not args.is_local:
        of = (args.dataset, args.dataset_config, args.dataset_revision)
        files = hub_files(*of, args.split, "--split")
        held_out = hub_files(*of, args.held_out_split, "--held_out_split") if args.held_out_split else []
        return Corpus(files, held_out, {"dataset": args.dataset, "config": args.dataset_config, "first_file": files[0].name})
    files = read_manifest(args.manifest) if args.manifest else find_files(args.documents)
    held_out = find_files(args.held_out_documents) if args.held_out_documents else []
    for file in held_out:
        same = (other for other in files if (other.size, other.modified_ns) == (file.size, file.modified_ns))
        if any(Path(file.name).samefile(other.name) for other in same):
            raise ValueError(f"{file.name} is among --documents and --held_out_documents: leave it out of one of them")
    return Corpus(files, held_out, {"documents": list(args.documents), "manifest": str(args.manifest or "")})


def describe(args: Args, corpus: Corpus, tokenizer) -> dict[str, Any]:
    """The header: all that decides the stream of tokens, and nothing else; None for what older packs do not know."""
    from lm.tokenizer import fingerprint, token_dtype

    if tokenizer.eos_token_id is None:
        raise ValueError(f"--tokenizer {args.tokenizer} has no end-of-sequence token, documents need one after them: set one")
    return {
        "seq_len": args.seq_len,
        "overlap": False if args.no_overlap else None,
        "dtype": token_dtype(len(tokenizer)),
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer": {"fingerprint": fingerprint(tokenizer)},
        "source": corpus.identity,
        "reading": asdict(reading_of(args, tokenizer)),
        "verify": args.verify,
        "blocks_per_shard": args.blocks_per_shard,
        "held_out_blocks": args.held_out_blocks,
    }


def written(header: dict[str, Any]) -> dict[str, Any]:
    """The header as it is kept: without None, so that packs that were made before there was such a key are still the same."""
    parts = {name: written(value) if isinstance(value, dict) else value for name, value in header.items()}
    return {name: value for name, value in parts.items() if value is not None}


def reading_of(args: Args, tokenizer) -> Reading:
    """How files become the documents that a tokenizer is given."""
    return Reading(args.text_column, args.text_unit, args.seed, args.shuffle_window, preparation(tokenizer))


class Display:
    """A bar on a terminal, a line every 10 seconds elsewhere: documents, tokens, their rate, the time left."""

    def __init__(self, packer: Packer):
        self.packer, self.before = packer, packer.tokens
        self.begin = self.said = time.monotonic()
        self.bar = tqdm(unit="token", unit_scale=True, initial=self.before, disable=not sys.stderr.isatty())

    def __call__(self, tokens: int, documents: int) -> None:
        """Show how many tokens and documents were encoded since the start."""
        now = time.monotonic()
        if self.bar.disable and now - self.said < SHOW_EVERY_SEC:
            return
        self.said = now
        target = self.packer.target_tokens or self.packer.expected_tokens(len(self.packer.pieces))
        if not self.bar.disable:
            self.bar.total = max(target, self.before + tokens)
            self.bar.update(self.before + tokens - self.bar.n)
            return
        rate, rest = tokens / (now - self.begin), target - self.before - tokens
        left = f", {rest / rate:,.0f} s left" if rate and rest > 0 else ""
        shards = len(self.packer.state["shards"])
        print(f"{documents:,} documents, {tokens:,} tokens, {rate:,.0f} tokens/s{left}; {shards} shards published", flush=True)


def begin(args: Args, job: Job, header: dict, corpus: Corpus, tokenizer) -> Packer:
    """The packer of this folder: with what is there, or with the held-out text that it writes first.

    Raises: ValueError if the folder holds another pack, or something else, or if there is not enough held-out text.
    """
    found, pieces = read_state(args.folder), cut(corpus.files, job.reading)
    if found is not None:
        refuse_other(found[0]["header"], header, args.folder)
        Pack(args.folder)  # looks at sizes and tokenizer, so that nothing is added to a damaged pack
        return Packer(args.folder, found[0], pieces, job)
    ours = ("held_out.bin", "tokenizer")  # a run that was killed before progress.json began with these
    if strangers := [path.name for path in args.folder.iterdir() if path.name not in ours and not path.name.startswith(".")]:
        raise ValueError(f"{args.folder} holds {strangers[0]}, which is no pack: pass another --output_dir, or remove it")
    from lm.tokenizer import save_tokenizer

    first = cut(corpus.held_out, job.reading)[0] if corpus.held_out else pieces[0]
    held_out = write_held_out(args, job, first, corpus, tokens_for(args.held_out_blocks, header))
    save_tokenizer(tokenizer, args.folder / "tokenizer")
    files = listed(args.folder, sorted(path for path in (args.folder / "tokenizer").rglob("*") if path.is_file()))
    state = new_state(written(header), held_out, files, corpus.about | {"tokenizer": args.tokenizer})
    packer = Packer(args.folder, state, pieces, job)
    packer.save()
    return packer


def write_held_out(args: Args, job: Job, piece: Piece, corpus: Corpus, needed: int) -> dict[str, Any]:
    """Write held_out.bin: the first documents of a piece of the held-out files, or of the corpus, which are not packed then."""
    job = replace(job, shard_tokens=needed, compare_all=True)
    packer = PiecePacker(job, CONTEXT.Array("q", 2), CONTEXT.Value("i", 0))
    if why := packer.encoder.why_not_fast:
        print(f"encoding with Hugging Face's tokenizers, which is slow: {why}")
    entry = packer.pack_first(piece, args.folder / "held_out.bin")
    if entry["tokens"] < needed or (entry["last"] and not corpus.held_out):
        raise ValueError(
            f"the held-out text would be {needed:,} tokens, {piece.files[0]} and what is read with it has {entry['tokens']:,}:"
            " pass fewer --held_out_blocks, or --held_out_documents, or another --seed"
        )
    return entry | {"file": "held_out.bin", "first_record": 0 if corpus.held_out else entry["records"][1]}


def work(args: Args, packer: Packer) -> dict[str, Any] | None:
    """Pack all, or a share, or join the shares; the meta if the pack is finished now."""
    if args.join:
        packer.publish()
        if not packer.enough:
            pieces = ", ".join(map(str, packer.missing()[:10]))
            raise RuntimeError(
                f"{packer.folder} lacks pieces {pieces}: run the tasks again, all with the same --num_tasks; they continue"
            )
        return packer.finish()
    numbers = range(args.task or 0, len(packer.pieces), args.num_tasks)
    if len(numbers) < args.num_workers:
        why = "a compressed file cannot be entered in the middle, a large one that is not can"
        print(f"{len(numbers)} pieces for {args.num_workers} workers ({why})")
    packer.run(iter(numbers), args.num_workers, publish=args.task is None, show=Display(packer))
    return packer.finish() if args.task is None else None


def summary(folder: Path, meta: dict[str, Any]) -> Iterator[str]:
    """Lines that say what there is, and what a reader should know."""
    seq_len, apart = meta["header"]["seq_len"], "" if meta["header"].get("overlap", True) else " that do not overlap"
    yield (
        f"{folder}: {meta['num_documents']:,} documents, {meta['num_tokens']:,} tokens, {meta['num_blocks']:,} blocks of"
        f" {seq_len} + 1{apart} in {len(meta['shards'])} shards; {meta['tokens_after_the_last_block']:,} tokens after the last"
        " block"
    )
    for reason, count in meta["left_out"].items():
        yield f"left out: {count:,} documents, {reason}"
    for place in itertools.islice(itertools.chain.from_iterable(shard["left_out_at"] for shard in meta["shards"]), 5):
        yield f"  {place}"
    encoders = sorted({shard["encoder"] for shard in meta["shards"]})
    yield f"encoded by {', '.join(encoders)}; {meta['num_compared']:,} documents compared with Hugging Face's ids"
    if meta["num_differing"]:
        yield (
            f"warning: {meta['num_differing']:,} of them differed, and got Hugging Face's ids; of those not compared some may"
            " differ too: pass --verify all, and another --output_dir"
        )
    if meta["target_blocks"] is not None and meta["num_blocks"] < meta["target_blocks"]:
        yield f"warning: that is all the text there is, {meta['target_blocks']:,} blocks were asked for"


def pack(args: Args) -> None:
    """Do what is still to be done. Raises: whatever is wrong with the files or the folder."""
    from lm.tokenizer import load_tokenizer  # transformers takes seconds: not for --help or wrong arguments

    corpus = find_corpus(args)
    tokenizer = character_tokenizer() if args.tokenizer == "char" else load_tokenizer(args.tokenizer)
    header, reading = describe(args, corpus, tokenizer), reading_of(args, tokenizer)
    job = Job(
        partial=args.folder / "partial",
        reading=reading,
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        dtype=DTYPES[header["dtype"]],
        shard_tokens=args.blocks_per_shard * stride(header),
        compare_all=args.verify == "all",
        skip_bad_documents=args.skip_bad_documents,
    )
    doing, share = f"packing {args.folder}", fcntl.LOCK_EX if args.task is None else fcntl.LOCK_SH
    with locked(args.folder / ".lock", doing, share | fcntl.LOCK_NB):
        with locked(args.folder / ".begin.lock", doing, fcntl.LOCK_EX):  # the tasks of an array start together
            packer = begin(args, job, header, corpus, tokenizer)
            is_done = packer.ask_for(args.target_blocks)
        if is_done:
            print(f"{args.folder} is finished, nothing to do")
            meta = packer.state
        else:
            if packer.tokens:
                print(f"continuing after {packer.tokens:,} tokens in {len(packer.state['shards'])} shards")
            meta = work(args, packer)
    lines = summary(args.folder, meta) if meta else [f"share {args.task} of {args.num_tasks} is packed: --join when all are"]
    print(*lines, sep="\n")


def main(args: Args) -> None:
    check(args.faults())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    try:
        pack(args)
    except Exception as error:
        if not disk_full(error):
            raise
        raise RuntimeError(
            f"the disk is full ({error}); what was packed in {args.folder} is kept: make room, and give the same command again"
            " to continue"
        ) from error


if __name__ == "__main__":
    try:
        main(parse(Args))
    except KeyboardInterrupt:
        print("stopped; the same command continues at the last whole shard", file=sys.stderr)
        sys.exit(130)
