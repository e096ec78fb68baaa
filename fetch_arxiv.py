"""Turn categorised papers into token ids on the disk: the paper store that train.py and evaluate_model.py read.

    python fetch_arxiv.py --full_dataset                 # ccdv/arxiv-classification: 33,388 papers, 1 GB download
    python fetch_arxiv.py                                # a trial: the first 50 papers of each split
    python fetch_arxiv.py --dataset FOLDER --tokenizer FOLDER --full_dataset       # local files, no network

A killed run continues when the same command is given again, and ends with the same bytes. A trial streams, so it takes
from the hub no more than it needs; `--full_dataset` downloads everything once into the cache of `datasets` (HF_HOME).

Reads   a hub dataset, or local .parquet / .jsonl files, with columns `text` and `label`; a tokenizer.
Writes  OUTPUT_DIR/tokens.bin, index.jsonl, splits.json, tokenizer/, meta.json (lm/papers.py says what they hold).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lm.args import check, parse
from lm.files import sha256
from lm.labelled import Split, open_labelled
from lm.paper_writer import PaperWriter, differences, move_into_place, refuse_other, stored
from lm.papers import read_papers
from lm.s3 import S3Error, S3Folder
from lm.sources import disk_full, local_files

# The labels of ccdv/arxiv-classification in order (its dataset card).
ARXIV = ["math.AC", "cs.CV", "cs.AI", "cs.SY", "math.GR", "cs.CE", "cs.PL", "cs.IT", "cs.DS", "cs.NE", "math.ST"]
LOG_EVERY_SEC = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    """Tokenise categorised papers into one folder."""

    dataset: tuple[str, ...] = ("ccdv/arxiv-classification",)
    """A hub dataset, a local folder, or local .parquet / .jsonl files; local names start with train, validation, test."""
    dataset_config: str = "no_ref"
    """Configuration of the hub dataset; of a local folder, its subfolder of that name if there is one."""
    label_names: tuple[str, ...] = ()
    """Names of the integer labels 0, 1, ... (default: what the source says, else the eleven ArXiv categories)."""
    tokenizer: str = "EleutherAI/pythia-70m-deduped"
    """A hub name, or a folder with tokenizer.json."""
    output_dir: Path = Path("preprocessed_arxiv")
    """Folder of the result."""
    max_examples_per_split: int = 50
    """Rows to take from the start of each split."""
    full_dataset: bool = False
    """Take all rows, whatever --max_examples_per_split says."""
    download_from_s3: bool = False
    """Fetch the finished folder from the bucket if it is there, else make it here."""
    upload_to_s3: bool = False
    """Upload the finished folder to the bucket."""
    s3_bucket: str = ""
    """Name of the bucket."""
    s3_prefix: str = "preprocessed_arxiv"
    """Folder in the bucket."""

    @property
    def limit(self) -> int | None:
        """Rows per split, None for all."""
        return None if self.full_dataset else self.max_examples_per_split


def faults_of(args: Args) -> list[str]:
    """Everything that cannot be right in the arguments themselves."""
    faults = []
    if not args.dataset:
        faults.append("--dataset is empty, a hub name or local paths are needed")
    if len(args.dataset) > 1 and (missing := [name for name in args.dataset if not Path(name).is_file()]):
        faults.append(f"--dataset {' '.join(missing)}: no such file, several names must be files")
    if args.max_examples_per_split < 1:
        faults.append(f"--max_examples_per_split {args.max_examples_per_split}, at least 1 is needed")
    if (args.download_from_s3 or args.upload_to_s3) and not args.s3_bucket:
        faults.append("--s3_bucket is empty, --download_from_s3 and --upload_to_s3 need a bucket's name")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        faults.append(f"--output_dir {args.output_dir} is a file, a folder is needed")
    return faults


def describe(args: Args, files: dict[str, list[Path]] | None) -> dict:
    """What decides the rows and labels: local files count by content, wherever they lie."""
    if files is None:
        source = {"dataset": args.dataset[0], "dataset_config": args.dataset_config}
    else:
        content = {split: [[path.name, sha256(path)] for path in paths] for split, paths in files.items()}
        source = {"dataset": "local files", "sha256": content}
    return source | {"label_names": list(args.label_names), "max_examples_per_split": args.limit}


class Progress:
    """A bar on a terminal, a line every 10 seconds elsewhere: papers, rates, time left."""

    def __init__(self, done: int, total: int):
        self.start_sec = self.line_sec = time.monotonic()
        self.first, self.done, self.total, self.tokens = done, done, total, 0
        self.bar = tqdm(initial=done, total=total, unit="paper", disable=not sys.stderr.isatty())

    def add(self, papers: int, tokens: int) -> None:
        self.done, self.tokens, now = self.done + papers, self.tokens + tokens, time.monotonic()
        self.bar.set_postfix_str(f"{self.tokens / (now - self.start_sec):,.0f} tokens/s", refresh=False)
        self.bar.update(papers)
        if self.bar.disable and now - self.line_sec >= LOG_EVERY_SEC:
            self.line_sec = now
            print(self.line(), flush=True)

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.start_sec, 1e-9)
        papers_per_sec = (self.done - self.first) / elapsed
        left = (self.total - self.done) / papers_per_sec if papers_per_sec else float("inf")
        rates = f"{papers_per_sec:,.1f} papers/s, {self.tokens / elapsed:,.0f} tokens/s"
        return f"{self.done:,}/{self.total:,} papers, {rates}, {left:,.0f} s left"


def write_papers(writer: PaperWriter, splits: dict[str, Split], label_names: list[str], tokenizer) -> None:
    """Tokenise every row that is not written yet; every batch is safe on the disk before the next one."""
    from lm.tokenizer import encode_documents

    progress = Progress(sum(writer.rows.values()), sum(split.size for split in splits.values()))
    for name, split in splits.items():
        for batch in split.batches(writer.rows[name], label_names):
            before = writer.num_tokens
            encoded = iter(encode_documents(tokenizer, [text for text, _, reason in batch if reason is None]))
            for _, category, reason in batch:
                if reason is not None:
                    writer.leave_out(name, reason)
                elif len(ids := next(encoded)):
                    writer.add(name, category, ids)
                else:
                    writer.leave_out(name, "no tokens")
            writer.commit()
            progress.add(len(batch), writer.num_tokens - before)
    progress.bar.close()
    print(progress.line())


def make(args: Args, files: dict[str, list[Path]] | None, source: dict, tokenizer) -> None:
    """Make the store here, or what is missing of it."""
    from lm.tokenizer import fingerprint, load_tokenizer, token_dtype

    tokenizer = tokenizer or load_tokenizer(args.tokenizer)
    header = {"dtype": token_dtype(len(tokenizer)), "vocab_size": len(tokenizer), "source": source}
    header["tokenizer"] = {"name": args.tokenizer, "fingerprint": fingerprint(tokenizer)}
    if header["dtype"] != "uint16":
        print(f"{len(tokenizer):,} ids do not fit uint16: tokens.bin is {header['dtype']}")
    splits = open_labelled(args.dataset[0], args.dataset_config, files, args.limit)
    label_names = list(args.label_names) or splits["train"].label_names
    if not label_names and splits["train"].labels_are_numbers:
        label_names = ARXIV
        print(f"the labels are numbers without names, taken as {', '.join(ARXIV)}: else pass --label_names")
    writer = PaperWriter(args.output_dir, header, splits)
    if done := sum(writer.rows.values()):
        print(f"{args.output_dir} is unfinished: continuing after {done:,} rows")
    write_papers(writer, splits, label_names, tokenizer)
    writer.finish(tokenizer)


def download(args: Args, asked: dict) -> bool:
    """Whether the store came from the bucket; if not, the reason is said."""
    try:
        remote = S3Folder(args.s3_bucket, args.s3_prefix)
        if different := differences(remote.read_meta(), asked):
            raise S3Error(f"{remote.url} holds other data ({'; '.join(different)}): pass another --s3_prefix")
        fetched = remote.download(args.output_dir / "partial" / "download")
    except S3Error as error:
        print(f"nothing taken from S3, making it here: {error}")
        return False
    move_into_place(args.output_dir / "partial" / "download", args.output_dir)
    print(f"{len(fetched)} files from {remote.url}")
    return True


def main(args: Args) -> None:
    check(faults_of(args))
    files = local_files(args.dataset, args.dataset_config)
    source = describe(args, files)
    asked, tokenizer = {"source": source, "tokenizer": {"name": args.tokenizer}}, None
    if Path(args.tokenizer).is_dir():  # a folder may have got another tokenizer since; a hub name stands for one
        from lm.tokenizer import fingerprint, load_tokenizer  # transformers takes seconds to load

        tokenizer = load_tokenizer(args.tokenizer)
        asked["tokenizer"] = {"fingerprint": fingerprint(tokenizer)}
    there, finished = stored(args.output_dir)
    if there is not None:
        refuse_other(there, asked, args.output_dir)
    if finished:
        print(f"{args.output_dir} is finished, nothing to do")
    try:
        if not finished and not (args.download_from_s3 and download(args, asked)):
            make(args, files, source, tokenizer)
    except Exception as error:
        if not disk_full(error):
            raise
        raise RuntimeError(
            f"the disk is full ({error}); what was done in {args.output_dir} is kept: make room, and give the same "
            "command again to continue"
        ) from error
    meta = read_papers(args.output_dir).meta
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in meta["left_out"].items())
    print(f"{args.output_dir}: {meta['num_papers']:,} papers, {meta['num_tokens']:,} tokens; left out: {left_out or 'none'}")
    for name, count in meta["categories"].items():
        print(f"  {name:<20} {count['papers']:>7,} papers {count['tokens']:>13,} tokens")
    if args.upload_to_s3:
        remote = S3Folder(args.s3_bucket, args.s3_prefix)
        print(f"{len(remote.upload(args.output_dir, [*meta['files'], 'meta.json']))} files to {remote.url}")


if __name__ == "__main__":
    main(parse(Args))
