"""Clean text for build_pretrain.py: filtered, without duplicates, and without what the model is to be evaluated on.

    python clean_corpus.py --manifest shards.txt --output_dir clean --eval_decontaminate hellaswag,piqa --rows samples/tasks
    python clean_corpus.py ... --executor slurm --tasks 100 --partition cpu           # the same bytes, on a cluster
    python build_pretrain.py --scratch_dir S --manifest clean/manifest.txt

Each document is normalised (ftfy, NFC), and goes for the first reason that there is: its language, Gopher's rules of quality
and repetition, an earlier document of the same text, an earlier one that is nearly the same (MinHash), a row of an evaluation
set in it. Of duplicates the first in the order of the files stays. The bytes are the same for any number of workers; a
killed run continues with the pieces of some 64 MB that it has not finished, when the same command is given again.

Reads   --documents (.jsonl, .json, .txt, .md, also .gz or .zst; .parquet) or a --manifest; --rows of tasks (fetch_samples.py)
Writes  OUTPUT_DIR/part_*.jsonl.zst  a text in each row, its source file and the line (or row) there
        OUTPUT_DIR/manifest.txt, removed.jsonl (examples), report.json, removed.png; at the end meta.json
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lm.args import below, check, outside_0_to_1, parse
from lm.cleaning import MADE_BY, Job, Steps
from lm.cleaning_local import run_locally
from lm.cleaning_report import FORMAT, SUBMITTED, table, tidy
from lm.cleaning_stages import prepare
from lm.contamination import Evaluation, chosen_tasks
from lm.corpus import File, digest, find_files, read_manifest
from lm.documents import Reading, cut
from lm.files import listed, locked, read_json, read_sealed, write_json, write_sealed
from lm.paper_writer import refuse_other
from lm.records import TextUnit
from lm.sources import disk_full

UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo")  # languages


@dataclass(frozen=True, kw_only=True)
class Args:
    """Clean one corpus."""

    output_dir: Path
    """Folder of the clean corpus; new, empty, or of this very command."""
    documents: tuple[str, ...] = ()
    """Files, folders or patterns."""
    manifest: Path | None = None
    """A file with the path of one file on each line, instead of --documents."""
    text_column: str = "text"
    """Column of JSON Lines and Parquet files that holds the text."""
    text_unit: TextUnit = "file"
    """What one document is in text files."""
    skip_bad_documents: bool = False
    """Leave out, and count, what is no document: damaged files, lines that are not JSON, texts that are not strings."""

    unicode: bool = True
    """Repair the encoding (ftfy), normalise to NFC, remove control characters."""
    language: str = "en"
    """Keep this language (ISO 639 code) alone; "" keeps all."""
    language_threshold: float = 0.65
    """Probability that a document is in it, at least."""
    gopher: bool = True
    """Apply Gopher's rules of quality and repetition, which are for English."""
    c4: bool = False
    """Keep C4's lines alone, and apply its rules for documents."""
    exact: bool = True
    """Remove documents with the text of an earlier one, spaces aside."""
    minhash: bool = True
    """Remove documents that are nearly the same as an earlier one."""
    shingle_words: int = 5
    """Words in a row that documents are compared by."""
    bands: int = 14
    """Bands of the MinHash signature; one that is equal makes two documents duplicates."""
    rows_per_band: int = 8
    """Hash functions in a band."""
    eval_decontaminate: str = ""
    """Tasks of lm-eval, with commas between them, whose rows must not be in a document."""
    rows: Path | None = None
    """Folder of the rows of tasks (fetch_samples.py --parts tasks); without it they come from the hub."""
    eval_documents: tuple[str, ...] = ()
    """Files, folders or patterns of other texts that must not be in a document; of a text file, each of its lines."""

    compression: Literal["zst", "gz"] = "zst"
    """Of the parts."""
    examples: int = 20
    """Removed documents that are shown for each reason."""
    memory_mb: int = 1024
    """Memory that a process takes at most to find duplicates, in more steps if it must; 40 do for a million documents."""
    num_workers: int = len(os.sched_getaffinity(0))
    """Processes on this machine."""
    executor: Literal["local", "slurm"] = "local"
    """Run here, or submit a chain of SLURM jobs (datatrove) and return."""
    tasks: int = 100
    """Tasks of each SLURM job."""
    partition: str = ""
    """SLURM's partition."""
    time: str = "24:00:00"
    """SLURM's time limit of a task."""
    sbatch: tuple[str, ...] = ()
    """Other options of sbatch, as name=value."""
    resubmit: bool = False
    """Submit again what has been submitted and is not finished; its jobs must be gone from the queue."""

    @property
    def steps(self) -> Steps:
        return Steps(
            unicode=self.unicode,
            language=self.language,
            language_threshold=self.language_threshold,
            gopher=self.gopher,
            c4=self.c4,
            exact=self.exact,
            bands=self.bands if self.minhash else 0,
            rows_per_band=self.rows_per_band,
            shingle_words=self.shingle_words,
        )

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = below(self, 1, "shingle_words", "bands", "rows_per_band", "memory_mb", "num_workers", "tasks")
        found += below(self, 0, "examples") + outside_0_to_1(self, "language_threshold")
        if bool(self.documents) == bool(self.manifest):
            found.append(f"--documents {' '.join(self.documents)} and --manifest {self.manifest}: pass one of them")
        if not all((*self.documents, *self.eval_documents)):
            found.append("--documents or --eval_documents has an empty name: is a variable of the shell not set?")
        if self.language not in ("", "en") and self.gopher:
            found.append(f"--language {self.language}, and Gopher's rules want English stop words: pass --no_gopher too")
        if self.language in UNSPACED and (self.minhash or self.eval_decontaminate or self.eval_documents):
            found.append(
                f"--language {self.language} has no spaces between words, by which near-duplicates and rows of evaluations are"
                " found: pass --no_minhash, and leave --eval_* out"
            )
        if self.eval_decontaminate and not chosen_tasks(self.eval_decontaminate):
            found.append(f"--eval_decontaminate {self.eval_decontaminate!r} names no task: is a variable of the shell not set?")
        if self.rows and not self.eval_decontaminate:
            found.append(f"--rows {self.rows} without --eval_decontaminate: pass the tasks whose rows are meant")
        if self.executor == "slurm" and not self.partition:
            found.append("--executor slurm without --partition: pass one of those that `sinfo` lists")
        if wrong := [option for option in self.sbatch if "=" not in option]:
            found.append(f"--sbatch {wrong[0]!r} has no value: pass it as name=value")
        if self.output_dir.exists() and not self.output_dir.is_dir():
            found.append(f"{self.output_dir} is a file, a folder is needed: pass another --output_dir")
        if self.language:
            from lm.language import languages

            if self.language not in (known := languages().names.tolist()):
                found.append(f"--language {self.language!r} is not known: choose from {','.join(known)}")
        return found


def tried(faults: list[str], read: Callable[[], list[File]]) -> list[File]:
    """The files that are found; what is wrong with them is added to the faults."""
    try:
        return read()
    except (ValueError, FileNotFoundError) as error:
        faults.append(str(error))
        return []


def job_of(args: Args) -> tuple[Job, dict[str, Any]]:
    """The job, and its header: all that decides its result. Raises: ValueError with all faults."""
    faults = args.faults()
    files, against = [], []
    if bool(args.documents) != bool(args.manifest):
        files = tried(faults, lambda: read_manifest(args.manifest) if args.manifest else find_files(args.documents))
    if args.eval_documents:
        against = tried(faults, lambda: find_files(args.eval_documents))
    inside = [file.name for file in files if Path(file.name).resolve().is_relative_to(args.output_dir.resolve())]
    if not args.manifest:  # a folder that is searched may hold what is made of it
        files = [file for file in files if file.name not in inside]
    if inside and (args.manifest or not files):
        faults.append(f"{inside[0]} is in --output_dir {args.output_dir}, which is for what is made of it: pass another folder")
    tasks = chosen_tasks(args.eval_decontaminate)
    evaluation = Evaluation(tasks, args.rows, tuple(against), args.text_column)
    if tasks and not any((args.output_dir / name).exists() for name in ("meta.json", "progress.json")):
        faults += evaluation.faults()  # takes seconds: not to find that all is done
    check(faults)
    reading = Reading(args.text_column, args.text_unit, shuffle_window=0)
    job = Job(
        folder=args.output_dir,
        pieces=cut(files, reading),
        reading=reading,
        steps=args.steps,
        evaluation=evaluation,
        compression=args.compression,
        examples=args.examples,
        memory=args.memory_mb * 2**20,
        skip_bad_documents=args.skip_bad_documents,
    )
    header = {
        "source": {"files": digest(files), "num_files": len(files)},
        "reading": asdict(reading),
        "steps": asdict(args.steps),
        "evaluation": evaluation.identity(),
        "compression": args.compression,
        "examples": args.examples,
        "versions": {package: version(package) for package in ("ftfy", "py3langid")},
    }
    return job, header


def begin(folder: Path, header: dict[str, Any]) -> bool:
    """Make the folder this job's; whether the job is finished already.

    Raises: ValueError if it holds another corpus, or something else, or what was finished has changed.
    """
    finished = (folder / "meta.json").exists()
    if finished and (there := read_json(folder / "meta.json", MADE_BY).get("format")) != FORMAT:
        raise ValueError(f"{folder}/meta.json has format {there!r:.80}, {FORMAT!r} is needed: pass another --output_dir")
    if finished or (folder / "progress.json").exists():
        known = read_sealed(folder / ("meta.json" if finished else "progress.json"), MADE_BY, FORMAT)
        refuse_other(known["header"], header, folder)
        if finished:
            check_files(folder, known["files"])
            tidy(folder)
        return finished
    if strangers := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
        raise ValueError(f"{folder} holds {strangers[0]}, which is no clean corpus: pass another --output_dir, or remove it")
    write_sealed(folder / "progress.json", {"format": FORMAT, "header": header})
    return False


def check_files(folder: Path, files: dict[str, Any]) -> None:
    """Raises: ValueError naming the first file of a finished corpus that is not what was written."""
    for name, facts in files.items():
        path = folder / name
        if not path.is_file() or listed(folder, [path])[name] != facts:
            raise ValueError(f"{path} is not what was written: remove {folder}, and give the same command again")


def show(folder: Path) -> None:
    """Print the report of a finished corpus."""
    report = read_json(folder / "report.json", MADE_BY)
    print(table(report))
    if not report["kept"]["documents"]:
        print(f"warning: nothing is left; {folder}/removed.jsonl shows why")


def clean(args: Args) -> None:
    """Do what is still to be done. Raises: whatever is wrong with the files or the folder."""
    job, header = job_of(args)
    with locked(args.output_dir / ".lock", f"cleaning into {args.output_dir}"):
        if begin(args.output_dir, header):
            print(f"{args.output_dir} is finished, nothing to do")
            return show(args.output_dir)
        submitted = args.output_dir / SUBMITTED
        if submitted.exists() and not args.resubmit:
            jobs = " ".join(read_json(submitted, MADE_BY)["jobs"])
            raise ValueError(
                f"{args.output_dir} was submitted as the SLURM jobs {jobs}: wait for them, or scancel and --resubmit"
            )
        prepare(job)
        if args.executor == "slurm":
            from lm.cleaning_slurm import submit

            jobs = submit(job, args.tasks, args.partition, args.time, dict(option.split("=", 1) for option in args.sbatch))
            write_json(submitted, {"jobs": jobs})
            print(f"submitted as {' '.join(jobs)}; when {args.output_dir}/meta.json is there the same command shows the result")
            return
        run_locally(job, args.num_workers)
    show(args.output_dir)


def main(args: Args) -> None:
    try:
        clean(args)
    except Exception as error:
        if not disk_full(error):
            raise
        raise RuntimeError(
            f"the disk is full ({error}); what was finished in {args.output_dir} is kept: make room, and give the same command"
            " again to continue"
        ) from error


if __name__ == "__main__":
    try:
        main(parse(Args))
    except KeyboardInterrupt:
        print("stopped; the same command continues with what is not finished", file=sys.stderr)
        sys.exit(130)
