"""clean_corpus.py: what is planted is found, and the bytes are the same whoever cleans and however often it is killed."""

import contextlib
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from slurm import start_cluster, wait_until, why_not
from test_cleaning_filters import OTHER, PROSE
from training import ROOT, flags, kill

import lm.cleaning_stages
import lm.documents
from clean_corpus import SUBMITTED, Args, begin, job_of, main
from lm.cleaning import Steps, judge
from lm.cleaning_slurm import chain
from lm.cleaning_stages import STAGES, Plan, prepare, run_task
from lm.corpus import open_stream, read_manifest
from lm.deduplication import RECORD_BYTES, Runs, find_duplicates, first_duplicates, ranges_for, write_run
from lm.files import read_json, read_sealed, sha256, write_json

PIECE = 12_000  # bytes, in place of 64 MB
SHORT = "This is a sentence in plain English, which is too short to be a document of its own."
IN_SMALL_PIECES = f"""
import lm.documents
lm.documents.PIECE_BYTES, lm.documents.FILES_IN_A_PIECE = {PIECE}, 1
import clean_corpus
clean_corpus.main(clean_corpus.parse(clean_corpus.Args))
"""


def changed(text: str, share: float, seed: int) -> str:
    """The text with so many of its words replaced."""
    words, generator = text.split(), random.Random(seed)
    for at in generator.sample(range(len(words)), max(1, round(share * len(words)))):
        words[at] = f"changed{at}"
    return " ".join(words)


@pytest.fixture(scope="module")
def abstracts(samples) -> list[str]:
    """Real documents that pass the filters, all different."""
    with open(samples / "pubmed/test.jsonl") as file:
        texts = [json.loads(line)["text"] for line in file]
    return [text for text in texts if 600 < len(text) < 1500 and judge(text, Steps())[1] is None][:60]


@pytest.fixture(scope="module")
def corpus(abstracts, tmp_path_factory) -> Path:
    """Files of four formats: abstracts, and what is planted among them, named in a manifest."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = {
        "a.jsonl": [*abstracts[:30], OTHER["de"] * 5, SHORT, " "],
        "b.jsonl.gz": [*abstracts[30:40], abstracts[3], changed(abstracts[4], 0.01, 0), abstracts[5] + "  \n"],
        "d.jsonl": [changed(abstracts[4], 0.01, 1), *abstracts[50:], abstracts[3], f"{abstracts[1]} {PROSE} {abstracts[2]}"],
    }
    for name, texts in rows.items():
        data = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    pq.write_table(pa.table({"text": [*abstracts[40:50], abstracts[45]]}), folder / "c.parquet", row_group_size=4)
    (folder / "eval.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    (folder / "shards.txt").write_text("a.jsonl\nb.jsonl.gz\nc.parquet\nd.jsonl\n")
    return folder


@pytest.fixture
def args(corpus, tmp_path, monkeypatch) -> Args:
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", PIECE)  # this process cuts, the workers are told the pieces
    monkeypatch.setattr(lm.documents, "FILES_IN_A_PIECE", 1)
    evaluation = (str(corpus / "eval.jsonl"),)
    return Args(manifest=corpus / "shards.txt", output_dir=tmp_path / "clean", eval_documents=evaluation, num_workers=1)


def here(args: Args) -> Path:
    """Run all stages in this process, the tasks of each in reverse."""
    args.output_dir.mkdir(exist_ok=True)
    job, header = job_of(args)
    begin(args.output_dir, header)
    prepare(job)
    for stage in STAGES:
        for number in reversed(range(stage.num_tasks(job) if stage.num_tasks else 1)):
            run_task(job, stage, number, lambda _: None)
    return args.output_dir


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> dict[str, str]:
    """The files of the clean corpus."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.documents, "PIECE_BYTES", PIECE)
        patch.setattr(lm.documents, "FILES_IN_A_PIECE", 1)
        evaluation = (str(corpus / "eval.jsonl"),)
        folder = tmp_path_factory.mktemp("expected") / "clean"
        return content(here(Args(manifest=corpus / "shards.txt", output_dir=folder, eval_documents=evaluation)))


def command_of(args: Args, **more) -> list[str]:
    settings = {"manifest": args.manifest, "eval_documents": args.eval_documents[0], "output_dir": args.output_dir}
    return [sys.executable, "-c", IN_SMALL_PIECES, *flags(**settings, **more)]


def content(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def rows_of(folder: Path) -> list[dict]:
    rows = []
    for file in read_manifest(folder / "manifest.txt"):
        with open_stream(file.name) as lines:
            rows += map(json.loads, lines)
    return rows


def test_what_is_planted_is_found_and_the_first_is_kept(args, corpus, abstracts):
    folder, name = here(args), lambda file: str(corpus / file)
    kept = [row["text"] for row in rows_of(folder)]
    assert kept == abstracts
    removed = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert {row["reason"]: row["documents"] for row in removed if "documents" in row} == {
        "empty": 1,
        "language": 1,
        "gopher: too few words": 1,
        "exact duplicate": 4,
        "near-duplicate": 2,
        f"contaminated: {name('eval.jsonl')}": 1,
    }
    examples = [row for row in removed if "documents" not in row]
    where = {(Path(row["file"]).name, row["line"]): row for row in examples}
    origins = {
        at: (Path(row["duplicate_of"]["file"]).name, row["duplicate_of"]["line"])
        for at, row in where.items()
        if "duplicate_of" in row
    }
    assert origins == {
        ("b.jsonl.gz", 11): ("a.jsonl", 4),
        ("b.jsonl.gz", 12): ("a.jsonl", 5),
        ("b.jsonl.gz", 13): ("a.jsonl", 6),
        ("c.parquet", 11): ("c.parquet", 6),
        ("d.jsonl", 1): ("a.jsonl", 5),
        ("d.jsonl", 12): ("a.jsonl", 4),
    }
    assert where["a.jsonl", 31]["language"] == "de"
    assert where["a.jsonl", 32]["excerpt"] == SHORT
    assert where["d.jsonl", 13]["contains"]["words"] == " ".join(PROSE.lower().split()[:13])


def test_every_row_says_where_it_comes_from(args, corpus):
    """Also in the parts of a file that is read in pieces."""
    job, _ = job_of(args)
    assert sum(piece.files[0].endswith("a.jsonl") for piece in job.pieces) > 2
    lines = {}
    for row in rows_of(here(args)):
        path = Path(row["source"])
        if path.name not in lines:
            if path.suffix == ".parquet":
                found = pq.read_table(path).to_pylist()
            else:
                with open_stream(str(path)) as stream:
                    found = [json.loads(line) for line in stream]
            lines[path.name] = [it["text"] for it in found]
        assert lines[path.name][row["line"] - 1] == row["text"]
    assert len(lines) == 4


def test_duplicates_of_duplicates_are_told_to_be_of_what_was_kept(args, abstracts, tmp_path):
    """Though the last of those that each changed a little shares no band with the first."""
    texts = [abstracts[0]]
    for seed in range(12):
        texts.append(changed(texts[-1], 0.015, seed))
    path = tmp_path / "chain.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = here(replace(args, manifest=None, documents=(str(path),)))
    kept = [row["line"] for row in rows_of(folder)]
    near = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()[1:]]
    assert len(kept) + len(near) == 13
    assert len(near) > 6
    assert {row["duplicate_of"]["line"] for row in near} <= set(kept)


def test_the_report_counts_every_document_once(args):
    folder = here(args)
    report = read_json(folder / "report.json", "")
    assert report["read"]["documents"] == 70
    assert report["kept"]["documents"] + sum(row["documents"] for row in report["removed"]) == 70
    assert report["kept"]["characters"] == sum(len(row["text"]) for row in rows_of(folder))
    assert (folder / "removed.png").read_bytes().startswith(b"\x89PNG")
    meta = read_sealed(folder / "meta.json", "")
    assert meta["files"].keys() == content(folder).keys() - {"meta.json"}
    assert not (folder / "partial").exists()


def test_examples_are_bounded(args, corpus):
    (corpus / "many.jsonl").write_text('{"text": "Short."}\n' * 2000)
    folder = here(replace(args, manifest=None, documents=(str(corpus / "many.jsonl"),), examples=3))
    lines = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    assert [row.get("line") for row in lines] == [None, 1, 2, 3]
    assert (folder / "manifest.txt").read_text() == ""


@pytest.mark.parametrize("off", ["exact", "minhash", "gopher", "language"])
def test_each_step_can_be_turned_off(off, args):
    folder = here(replace(args, **{off: "" if off == "language" else False}))
    reasons = {row["reason"].split(":")[0] for row in read_json(folder / "report.json", "")["removed"]}
    gone = {"exact": "exact duplicate", "minhash": "near-duplicate"}.get(off, off)
    assert reasons == {"empty", "language", "gopher", "exact duplicate", "near-duplicate", "contaminated"} - {gone}


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.slow
def test_any_number_of_workers_makes_the_same_bytes(num_workers, args, expected, capsys):
    main(replace(args, num_workers=num_workers))
    assert content(args.output_dir) == expected
    assert "near-duplicate" in capsys.readouterr().out
    main(args)
    assert "is finished, nothing to do" in capsys.readouterr().out


def test_any_memory_makes_the_same_bytes(args, corpus, monkeypatch, tmp_path):
    """More ranges of keys, and runs of a few documents."""
    whole = here(args)
    monkeypatch.setattr(lm.cleaning_stages, "RUN_DOCUMENTS", 4)
    cut = replace(args, output_dir=tmp_path / "cut")
    job, header = job_of(cut)
    job = replace(job, memory=1000)
    monkeypatch.setattr("test_clean_corpus.job_of", lambda _: (job, header))
    assert content(here(cut)) == content(whole)


def test_datatrove_makes_the_same_bytes(args, expected):
    from datatrove.executor import LocalPipelineExecutor

    job, header = job_of(args)
    args.output_dir.mkdir()
    begin(args.output_dir, header)
    prepare(job)
    chain(job, LocalPipelineExecutor, 2, workers=1).run()
    assert content(args.output_dir) == expected


@pytest.fixture(scope="module")
def cluster():
    if reason := why_not():
        pytest.skip(reason)
    with start_cluster() as cluster:
        yield cluster


@pytest.mark.slow
def test_slurm_makes_the_same_bytes(cluster, args, expected):
    command = command_of(args, executor="slurm", tasks=2, partition="low", sbatch="nodelist=n1")
    assert "submitted" in cluster.ask(*command)
    logs = args.output_dir / "logs"

    def explain() -> str:
        outputs = "".join(path.read_text()[-2000:] for path in logs.rglob("*.out"))
        return cluster.ask("squeue") + outputs

    wait_until((args.output_dir / "meta.json").exists, 240, explain)
    wait_until(lambda: not (args.output_dir / "progress.json").exists(), 10, explain)
    assert content(args.output_dir) == expected
    assert "is finished, nothing to do" in cluster.ask(*command)


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_and_ends_with_the_same_bytes(args, expected):
    generator = random.Random()
    for seconds in [*(generator.uniform(3, 10) for _ in range(3)), 120]:  # of which some go by before it begins
        process = subprocess.Popen(command_of(args, num_workers=2), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
        finally:
            kill(process)
    assert process.returncode == 0
    assert content(args.output_dir) == expected


def test_killed_between_any_two_files_it_continues(args, expected, tmp_path, monkeypatch):
    """Before and after every fortieth of its own renames."""
    real, count = os.replace, 0

    def counting(*arguments):
        nonlocal count
        count += 1
        real(*arguments)

    monkeypatch.setattr(os, "replace", counting)
    monkeypatch.setattr(os, "rename", counting)
    here(replace(args, output_dir=tmp_path / "whole"))
    total = count
    assert total > 30
    for last in range(1, total, 40):
        for after in (False, True):
            count, killed = 0, replace(args, output_dir=tmp_path / f"{last}{after}")

            def failing(*arguments, last=last, after=after):
                nonlocal count
                count += 1
                if count != last or after:
                    real(*arguments)
                if count == last:
                    raise SystemExit

            for name in ("replace", "rename"):
                monkeypatch.setattr(os, name, failing)
            with pytest.raises(SystemExit):
                here(killed)
            for name in ("replace", "rename"):
                monkeypatch.setattr(os, name, real)
            if not (killed.output_dir / "meta.json").exists():
                here(killed)
            assert content(killed.output_dir) == expected, (last, after)


def test_a_folder_of_other_settings_is_refused(args, tmp_path):
    here(args)
    with pytest.raises(ValueError, match=r"clean holds other data \(steps.bands: there 14, asked 10\)"):
        main(replace(args, bands=10))
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    with pytest.raises(ValueError, match="other holds precious, which is no clean corpus"):
        main(replace(args, output_dir=other))
    assert [path.name for path in other.iterdir() if path.name != ".lock"] == ["precious"]


def test_a_changed_part_is_named(args):
    part = next(here(args).glob("part_*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{part.name} is not what was written"):
        main(args)


def test_bad_documents_end_it_or_are_counted(args, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": PROSE}) + '\n{"text": 3}\n{\n')
    args = replace(args, manifest=None, documents=(str(bad),), eval_documents=())
    with pytest.raises(ValueError, match=r"bad.jsonl line 2 is no document: no string \(3\); mend it, or pass --skip_bad"):
        here(args)
    folder = here(replace(args, skip_bad_documents=True))
    report = read_json(folder / "report.json", "")
    assert [(row["reason"], row["documents"]) for row in report["removed"]] == [("no document", 2)]
    assert report["kept"]["documents"] == 1


def test_all_faults_are_told_together_before_anything_is_read(args, tmp_path):
    (tmp_path / "shards.txt").write_text("gone.jsonl\n")
    bad = replace(
        args,
        manifest=tmp_path / "shards.txt",
        eval_documents=("nothing*.jsonl",),
        eval_decontaminate="hellaswagg",
        rows=tmp_path,
        language="german",
        language_threshold=1.5,
        bands=0,
        examples=-1,
        executor="slurm",
        sbatch=("oops",),
    )
    with pytest.raises(ValueError, match="bands 0: at least 1") as error:
        main(bad)
    told = str(error.value)
    for fault in (
        "--bands 0: at least 1 is needed",
        "--examples -1: at least 0 is needed",
        "--language_threshold 1.5: a number in [0, 1] is needed",
        "--executor slurm without --partition",
        "--sbatch 'oops' has no value",
        "--language 'german' is not known: choose from ",
        "--language german, and Gopher's rules want English stop words: pass --no_gopher too",
        "no file nothing*.jsonl",
        "--eval_decontaminate 'hellaswagg' is no task (did you mean hellaswag?)",
    ):
        assert fault in told
    assert re.search("shards.txt line 1: .*gone.jsonl", told)
    assert not args.output_dir.exists()


def test_a_language_without_spaces_has_no_words_to_compare(args):
    with pytest.raises(ValueError, match="--language zh has no spaces between words.*pass --no_minhash"):
        main(replace(args, language="zh", gopher=False))
    assert not args.output_dir.exists()


def test_what_is_submitted_is_not_begun_again_unless_that_is_wanted(args, expected):
    args.output_dir.mkdir()
    begin(args.output_dir, job_of(args)[1])
    write_json(args.output_dir / SUBMITTED, {"jobs": ["17", "18"]})
    with pytest.raises(ValueError, match="was submitted as the SLURM jobs 17 18: wait for them, or scancel and --resubmit"):
        main(args)
    main(replace(args, resubmit=True))
    assert content(args.output_dir) == expected


@pytest.mark.parametrize("given", [{}, {"manifest": Path("x"), "documents": ("y",)}])
def test_one_source_is_needed(given, tmp_path):
    with pytest.raises(ValueError, match="--documents .* and --manifest .*: pass one of them"):
        main(Args(output_dir=tmp_path / "clean", **given))


def test_text_in_the_output_folder_is_not_cleaned_into_it(args, tmp_path):
    with pytest.raises(ValueError, match="a.jsonl is in --output_dir"):
        main(replace(args, output_dir=args.manifest.parent))


def make_runs(folder: Path, sizes: list[int], columns: int, distinct: int) -> list[np.ndarray]:
    generator, keys = np.random.default_rng(0), []
    for number, size in enumerate(sizes):
        keys.append(generator.integers(0, distinct, (size, columns)).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        (folder / str(number)).mkdir(parents=True)
        write_run(folder / str(number), keys[-1])
    return keys


@pytest.mark.parametrize("num_ranges", [1, 3])
def test_the_first_document_with_a_key_is_found(num_ranges, tmp_path):
    sizes = [50, 0, 7, 120]
    keys = make_runs(tmp_path / "runs", sizes, 2, 60)
    runs = Runs([tmp_path / f"runs/{number}" for number in range(4)], 2, num_ranges)
    for task in range(runs.num_tasks):
        find_duplicates(runs, task, tmp_path / f"tasks/{task}")
    first, everywhere = [{}, {}], [tmp_path / f"tasks/{task}" for task in range(runs.num_tasks)]
    for number, size in enumerate(sizes):
        wanted = []
        for row in range(size):
            at = (number << 32) + row
            earlier = [first[column].setdefault(int(keys[number][row, column]), at) for column in range(2)]
            wanted.append(min([1 + it for it in earlier if it != at], default=0))
        assert first_duplicates(everywhere, number, size).tolist() == wanted


def test_memory_for_duplicates_does_not_grow_with_the_corpus(tmp_path):
    """As many ranges are made as it takes."""
    memory, peaks = 4_000_000, []
    for runs_of_them in (2, 8):
        folder = tmp_path / str(runs_of_them)
        make_runs(folder, [60_000] * runs_of_them, 1, 2**62)
        num_ranges = ranges_for(60_000 * runs_of_them, memory)
        runs = Runs([folder / str(number) for number in range(runs_of_them)], 1, num_ranges)
        find_duplicates(runs, 0, folder / "warm")  # compiles
        tracemalloc.start()
        find_duplicates(runs, num_ranges - 1, folder / "task")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert ranges_for(10**6, 2**20 * 1024) == 1
    assert ranges_for(10**9, 2**30) == -(-RECORD_BYTES * 10**9 // 2**30)
    assert max(peaks) < memory * 1.25
    assert peaks[1] < peaks[0] * 1.25


def test_memory_of_a_piece_does_not_grow_with_its_documents(args, tmp_path, monkeypatch):
    """Runs end when they are long enough."""
    monkeypatch.setattr(lm.cleaning_stages, "RUN_DOCUMENTS", 100)
    peaks = []
    for count in (200, 200, 800):  # the first time compiles and loads
        path = tmp_path / f"{count}-{len(peaks)}.jsonl.gz"
        path.write_bytes(gzip.compress("".join(json.dumps({"text": f"{i} {PROSE} {i}"}) + "\n" for i in range(count)).encode()))
        job, header = job_of(replace(args, manifest=None, documents=(str(path),), output_dir=tmp_path / f"out{len(peaks)}"))
        job.folder.mkdir()
        begin(job.folder, header)
        prepare(job)
        tracemalloc.start()
        for stage in STAGES[:-1]:
            for number in range(stage.num_tasks(job) if stage.num_tasks else 1):
                run_task(job, stage, number, lambda _: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(Plan(job).sizes) == count // 100
    assert peaks[2] < peaks[1] * 1.2


def test_what_is_made_can_be_cleaned_again_and_stays_as_it_is(args, tmp_path):
    """By its manifest, as build_pretrain.py reads it."""
    folder = here(args)
    again = here(replace(args, manifest=folder / "manifest.txt", output_dir=tmp_path / "again"))
    assert [row["text"] for row in rows_of(again)] == [row["text"] for row in rows_of(folder)]
