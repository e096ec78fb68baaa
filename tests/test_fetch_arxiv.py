"""fetch_arxiv.py from the hub's protocol, local files and S3 to the paper store, killed, starved and misled on the way."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import hub
from test_papers import content
from text import byte_level_bpe, documents

from fetch_arxiv import ARXIV, Args, main
from lm.files import read_json, read_jsonl, read_sealed, write_sealed
from lm.papers import read_papers
from lm.tokenizer import encode_documents

ROOT = Path(__file__).parents[1]
SPLITS = {"train": 70, "validation": 10, "test": 5}


def source_rows(counts: dict[str, int] = SPLITS) -> dict[str, list[tuple[str, int]]]:
    """Real English and label numbers for each split; every text is another one."""
    texts = iter(range(10**9))
    real = documents()
    return {
        split: [(f"{n} {real[n % len(real)]}", n % 11) for n, _ in zip(texts, range(count), strict=False)]
        for split, count in counts.items()
    }


def write_parquet(folder: Path, rows: dict[str, list[tuple]], shards: int = 1) -> Path:
    """Files of the hub's schema, text and ClassLabel: {split}-00000-of-00001.parquet."""
    folder.mkdir(parents=True)
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=ARXIV)})
    for split, pairs in rows.items():
        size = -(-len(pairs) // shards)
        for shard in range(shards):
            texts, labels = zip(*pairs[shard * size : (shard + 1) * size], strict=True)
            table = pa.table({"text": texts, "label": labels}, schema=features.arrow_schema)
            pq.write_table(table, folder / f"{split}-{shard:05d}-of-{shards:05d}.parquet", row_group_size=8)
    return folder


def write_jsonl(folder: Path, rows: dict[str, list[dict]]) -> Path:
    folder.mkdir(parents=True)
    for split, values in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_bpe().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def local(tmp_path, tokenizer_dir) -> Args:
    """Arguments for all of a local folder of the hub's layout, made with the small tokenizer."""
    write_parquet(tmp_path / "source/no_ref", source_rows(), shards=2)
    write_parquet(tmp_path / "source/data", {split: [("not these", 0)] * 4 for split in SPLITS})
    dataset = (str(tmp_path / "source"),)
    return Args(dataset=dataset, tokenizer=tokenizer_dir, output_dir=tmp_path / "out", full_dataset=True)


def expect(folder: Path, rows: dict[str, list[tuple[str, int]]], limit: int | None = None) -> None:
    """The store holds exactly the first rows of each split, tokenised as plain text."""
    papers = read_papers(folder, verify=True)
    taken = [(f"{split}_{i}", *row) for split, pairs in rows.items() for i, row in enumerate(pairs[:limit])]
    ids = encode_documents(byte_level_bpe(), [text for _, text, _ in taken])
    assert papers.paper_ids == [paper_id for paper_id, _, _ in taken]
    assert [papers.category_names[c] for c in papers.categories] == [ARXIV[label] for _, _, label in taken]
    assert papers.lengths.tolist() == [len(each) for each in ids]
    np.testing.assert_array_equal(papers.tokens, np.concatenate(ids))
    assert {split: len(indices) for split, indices in papers.splits.items()} == {
        split: len(pairs[:limit]) for split, pairs in rows.items()
    }


# The hub, by the real command in a process of its own


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory, tokenizer_dir) -> Path:
    """What the hub has: the dataset with configurations default and no_ref, and the tokenizer."""
    folder = tmp_path_factory.mktemp("hub")
    repo = folder / "datasets/ccdv/arxiv-classification"
    write_parquet(repo / "no_ref", source_rows(), shards=2)
    write_parquet(repo / "data", {split: [("not these", 0)] * 4 for split in SPLITS})
    configs = []
    for config, place in (("default", "data"), ("no_ref", "no_ref")):
        files = [{"split": split, "path": f"{place}/{split}-*"} for split in SPLITS]
        configs.append({"config_name": config, "data_files": files})
    (repo / "README.md").write_text(f"---\n{json.dumps({'configs': configs})}\n---\nPapers.\n")
    target = folder / "models/EleutherAI/pythia-70m-deduped"
    target.parent.mkdir(parents=True)
    target.symlink_to(tokenizer_dir)
    return folder


def command(*options: object, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "fetch_arxiv.py", *map(str, options)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_hub_dataset_and_tokenizer_become_a_paper_store(hub_folder, tmp_path):
    """A trial streams, then the whole is downloaded, and once it is cached it needs no hub."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with hub(hub_folder) as server:
        ran = command("--output_dir", tmp_path / "trial", "--max_examples_per_split", 7, HF_ENDPOINT=server.url, **home)
        assert ran.returncode == 0, ran.stderr
        expect(tmp_path / "trial", source_rows(), limit=7)
        ran = command("--output_dir", tmp_path / "full", "--full_dataset", HF_ENDPOINT=server.url, **home)
        assert ran.returncode == 0, ran.stderr
        expect(tmp_path / "full", source_rows())
        parts = [path for _, path in server.asked if path.endswith(".parquet")]
        assert parts
        assert all("/no_ref/" in path for path in parts)
    ran = command("--output_dir", tmp_path / "again", "--full_dataset", HF_ENDPOINT=server.url, HF_HUB_OFFLINE="1", **home)
    assert ran.returncode == 0, ran.stderr
    assert content(tmp_path / "again") == content(tmp_path / "full")
    source = read_json(tmp_path / "full/meta.json", "")["source"]
    assert source == {
        "dataset": "ccdv/arxiv-classification",
        "dataset_config": "no_ref",
        "label_names": [],
        "max_examples_per_split": None,
    }


def test_hub_out_of_reach_says_what_to_do(tmp_path, tokenizer_dir):
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    ran = command("--output_dir", tmp_path / "out", "--tokenizer", tokenizer_dir, **home)
    assert ran.returncode == 1
    assert "RuntimeError: the hub gave no dataset 'ccdv/arxiv-classification' (no_ref)" in ran.stderr
    for advice in ("HF_ENDPOINT names another server", "HF_HUB_OFFLINE=1", "--dataset a folder", "fetch_samples.py"):
        assert advice in ran.stderr
    assert not (tmp_path / "out").exists()


# Local files, in this process


def test_local_folder_takes_the_same_path(local):
    main(local)
    expect(local.output_dir, source_rows())


def test_limit_takes_the_first_rows_of_each_split(local):
    main(replace(local, full_dataset=False, max_examples_per_split=6))
    expect(local.output_dir, source_rows(), limit=6)


def test_jsonl_files_with_label_words_equal_parquet(local, tmp_path):
    rows = {split: [{"label": ARXIV[c], "text": t} for t, c in pairs] for split, pairs in source_rows().items()}
    folder = write_jsonl(tmp_path / "jsonl", rows)
    main(replace(local, dataset=tuple(str(folder / f"{split}.jsonl") for split in SPLITS)))
    expect(local.output_dir, source_rows())


def test_numbers_without_names_are_the_eleven_categories_unless_named(local, tmp_path, capsys):
    rows = {split: [{"text": f"some text {i}", "label": i} for i in (0, 10)] for split in SPLITS}
    folder = write_jsonl(tmp_path / "numbers", rows)
    main(replace(local, dataset=(str(folder),)))
    assert read_papers(local.output_dir).category_names == ["math.AC", "math.ST"]
    assert "the labels are numbers without names, taken as math.AC, cs.CV" in capsys.readouterr().out
    names = tuple("abcdefghijk")
    main(replace(local, dataset=(str(folder),), label_names=names, output_dir=tmp_path / "named"))
    assert read_papers(tmp_path / "named").category_names == ["a", "k"]
    with pytest.raises(ValueError, match=r"train_1 has label 10, there are 2 label names \(a, b\): pass all with --label"):
        main(replace(local, dataset=(str(folder),), label_names=("a", "b"), output_dir=tmp_path / "few"))


def test_unusable_rows_are_left_out_and_counted(local, tmp_path):
    rows = {
        "train": [{"text": text, "label": "x"} for text in ("first", 3, None, ["a"], "", " \n\t", "last")],
        "validation": [{"text": "a", "label": None}, {"text": "b", "label": " "}, {"text": "c", "label": "y"}],
        "test": [{"text": "d", "label": "y"}, {"text": "e"}],
    }
    folder = write_jsonl(tmp_path / "bad", rows)
    with open(folder / "test.jsonl", "ab") as file:
        file.write(b'{"text": "not \xff\xfe UTF-8", "label": "y"}\n{"text": "f <|endoftext|>", "label": "y"}\n')
        file.write(b'{"text": "half a pair \\ud83d", "label": "y"}\n{"text": "a pair \\ud83d\\ude00", "label": "y"}\n')
    main(replace(local, dataset=(str(folder),)))
    papers = read_papers(local.output_dir)
    assert papers.paper_ids == ["train_0", "train_6", "validation_2", "test_0", "test_3", "test_5"]
    assert papers.meta["left_out"] == {"empty": 2, "label missing": 3, "not a string": 3, "not valid UTF-8": 2}
    assert 0 not in papers.tokens  # <|endoftext|> in a text is text


def test_bytes_that_are_no_utf8_in_parquet_are_left_out(local, tmp_path):
    (tmp_path / "bytes").mkdir()
    for split in SPLITS:
        pq.write_table(pa.table({"text": [b"a\xff", b"ok"], "label": ["x", "x"]}), tmp_path / f"bytes/{split}.parquet")
    main(replace(local, dataset=(str(tmp_path / "bytes"),)))
    assert read_papers(local.output_dir).meta["left_out"] == {"not valid UTF-8": 3}


def test_wide_vocabulary_is_stored_as_uint32_and_said(local, tmp_path, capsys):
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([f"word{i}" for i in range(65_537 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path / "wide")
    rows = {split: [{"text": "word65000 word65236", "label": "x"}] for split in SPLITS}
    folder = write_jsonl(tmp_path / "words", rows)
    main(replace(local, dataset=(str(folder),), tokenizer=str(tmp_path / "wide")))
    papers = read_papers(local.output_dir)
    assert papers.tokens.dtype == np.uint32
    assert papers.tokens.max() == 65_536
    assert "65,537 ids do not fit uint16: tokens.bin is uint32" in capsys.readouterr().out


def test_finished_run_says_so_and_does_nothing(local, capsys):
    main(local)
    before = {path: path.stat().st_mtime_ns for path in local.output_dir.rglob("*")}
    capsys.readouterr()
    main(local)
    assert "is finished, nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in local.output_dir.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_folder_of_another_run_is_refused(local, tmp_path, finished):
    main(local)
    if not finished:  # as it was just before the end
        meta = read_sealed(local.output_dir / "meta.json", "")
        (local.output_dir / "partial").mkdir()
        (local.output_dir / "meta.json").rename(local.output_dir / "partial/meta.json")
        rest = {"rows": dict.fromkeys(SPLITS, 0), "tokens": 0, "index_bytes": 0}
        write_sealed(local.output_dir / "partial/progress.json", meta | rest)
    tokenizer = byte_level_bpe(400)
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds other data \(tokenizer.fingerprint: there '.*', asked '.*'\): pass"):
        main(replace(local, tokenizer=str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"\(source.max_examples_per_split: there None, asked 5\)"):
        main(replace(local, full_dataset=False, max_examples_per_split=5))
    with pytest.raises(
        ValueError, match=r"\(source.sha256.train: there .*, asked .*; source.sha256.validation: .*; source.sha256.test: "
    ):
        main(replace(local, dataset=(str(Path(local.dataset[0]) / "data"),)))


def test_all_wrong_arguments_are_named_together(tmp_path):
    (tmp_path / "file").touch()
    bad = Args(dataset=("a", "b"), max_examples_per_split=0, upload_to_s3=True, output_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="--dataset a b: no such file") as caught:
        main(bad)
    for part in ("--max_examples_per_split 0, at least 1", "--s3_bucket is empty", f"--output_dir {tmp_path}/file is a file"):
        assert part in str(caught.value)


NAMES = ("train.jsonl", "validation.jsonl", "test.json")


@pytest.mark.parametrize(
    ("names", "row", "message"),
    [
        (["train.jsonl"], {"text": "a", "label": 1}, r"no file for validation, test \(found: train.jsonl\)"),
        ([], {}, r"no file for train, validation, test \(found: none\)"),
        (["training.jsonl", *NAMES[1:]], {"text": "a", "label": 1}, "no file for train "),
        ([*NAMES[:2], "test.parquet"], {"text": "a", "label": 1}, "has JSONL and parquet files"),
        (NAMES, {"body": "a", "label": 1}, r"split train has no column text \(found: body, label\)"),
        (NAMES, {"text": "a"}, r"split train has no column label \(found: text\)"),
        (NAMES, {"text": "a", "label": 1.5}, "train_0 has label 1.5, an integer or a string is needed"),
        (NAMES, ["a"], r"train.jsonl line 1 is \['a'\], an object is needed"),
        (NAMES, {"text": " ", "label": 1}, r"no paper in train, validation, test \(left out: \{'empty': 3\}\)"),
        (NAMES, {"text": 1, "label": 1}, r"no paper in train, validation, test \(left out: \{'not a string': 3\}\)"),
        (NAMES, None, "split train has no rows, at least one is needed"),
    ],
)
@pytest.mark.parametrize("full", [True, False])
def test_files_of_another_shape_are_named(local, tmp_path, names, row, message, full):
    (tmp_path / "shape").mkdir()
    for name in names:
        (tmp_path / "shape" / name).write_text(json.dumps(row) + "\n" if row else "")
    with pytest.raises(ValueError, match=message):
        main(replace(local, dataset=(str(tmp_path / "shape"),), full_dataset=full))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": [1], "label": ["x"]}, "column text of split train is int64, strings are needed"),
        ({"text": ["a"], "label": [1.5]}, "column label of split train is double, integers or strings are needed"),
        ({"body": ["a"], "label": ["x"]}, r"split train has no column text \(found: body, label\)"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "cannot be read .*: mend or remove"),
    ],
)
@pytest.mark.parametrize("full", [True, False])
def test_parquet_of_another_shape_is_named(local, tmp_path, columns, message, full):
    (tmp_path / "shape").mkdir()
    for split in SPLITS:
        pq.write_table(pa.table(columns), tmp_path / f"shape/{split}.parquet")
    with pytest.raises(ValueError, match=message):
        main(replace(local, dataset=(str(tmp_path / "shape"),), full_dataset=full))


@pytest.mark.parametrize("full", [True, False])
def test_broken_file_is_named(local, tmp_path, full):
    folder = write_jsonl(tmp_path / "broken", {split: [{"text": "a", "label": "b"}] for split in SPLITS})
    with open(folder / "validation.jsonl", "a") as file:
        file.write('{"text": "a')
    with pytest.raises(ValueError, match=r"validation.jsonl line 2 is not JSON \(Unterminated string.*: mend or remove"):
        main(replace(local, dataset=(str(folder),), full_dataset=full))
    zipped = write_jsonl(tmp_path / "zipped", {split: [{"text": "a", "label": "b"}] for split in SPLITS})
    for path in zipped.iterdir():
        path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes())[: None if "train" in path.name else -9])
        path.unlink()
    with pytest.raises(ValueError, match=r"(test|validation).jsonl.gz is damaged \(Compressed file ended before"):
        main(replace(local, dataset=(str(zipped),), full_dataset=full))
    source = Path(local.dataset[0]) / "no_ref"
    (source / "train-00000-of-00002.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match=r"the files of --dataset cannot be read \(.*[Pp]arquet"):
        main(replace(local, full_dataset=full))


def test_full_disk_is_said_and_the_run_continues_after_room_is_made(local, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(RuntimeError, match=r"the disk is full \(.*No space left.*\); what was done in .* is kept"):
            main(replace(local, output_dir=disk / "out"))
        done = read_json(disk / "out/partial/progress.json", "")["rows"]
        assert 0 < sum(done.values()) < 85
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        main(replace(local, output_dir=disk / "out"))
        main(local)
        assert content(disk / "out") == content(local.output_dir)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_run_killed_at_any_moment_ends_as_an_uninterrupted_one(tmp_path, tokenizer_dir):
    source = write_parquet(tmp_path / "source", source_rows({"train": 5000, "validation": 500, "test": 500}))
    args = Args(dataset=(str(source),), tokenizer=tokenizer_dir, output_dir=tmp_path / "whole", full_dataset=True)
    main(args)
    options = ["--dataset", source, "--tokenizer", tokenizer_dir, "--output_dir", tmp_path / "killed", "--full_dataset"]
    progress, seen, draw = tmp_path / "killed/partial/progress.json", [0], random.Random(0)
    for _ in range(4):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
        process = subprocess.Popen([sys.executable, "fetch_arxiv.py", *map(str, options)], cwd=ROOT, env=environment)
        while process.poll() is None and rows_done(progress) <= seen[-1]:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append(rows_done(progress))
    assert len({*seen, 6000}) == 6, seen  # every run got further, none was finished
    assert command(*options, HF_HOME=str(tmp_path / "home")).returncode == 0
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def rows_done(progress: Path) -> int:
    return sum(read_json(progress, "")["rows"].values()) if progress.exists() else 0


# S3


def test_store_goes_through_s3_unchanged(s3, local, tmp_path):
    main(replace(local, upload_to_s3=True, s3_bucket=s3[1]))
    for file in Path(local.dataset[0]).rglob("train*"):
        os.utime(file)  # the same content, though not made at the same time
    elsewhere = replace(local, output_dir=tmp_path / "elsewhere", download_from_s3=True, s3_bucket=s3[1])
    main(elsewhere)
    assert content(elsewhere.output_dir) == content(local.output_dir)


def test_without_its_bucket_or_with_other_data_in_it_the_store_is_made_here(s3, local, tmp_path, capsys):
    main(replace(local, download_from_s3=True, s3_bucket="not-there"))
    expect(local.output_dir, source_rows())
    assert "nothing taken from S3, making it here: no bucket not-there: create it" in capsys.readouterr().out
    main(replace(local, upload_to_s3=True, s3_bucket=s3[1]))
    trial = replace(local, output_dir=tmp_path / "trial", full_dataset=False, download_from_s3=True, s3_bucket=s3[1])
    main(trial)
    expect(trial.output_dir, source_rows(), limit=50)
    said = capsys.readouterr().out
    assert "holds other data (source.max_examples_per_split: there None, asked 50): pass another --s3_prefix" in said


def test_damaged_object_is_not_taken(s3, local, tmp_path, capsys):
    main(replace(local, upload_to_s3=True, s3_bucket=s3[1]))
    index = (local.output_dir / "index.jsonl").read_bytes()
    s3[0].put_object(Bucket=s3[1], Key="preprocessed_arxiv/index.jsonl", Body=index.replace(b"train_0", b"train_9"))
    main(replace(local, output_dir=tmp_path / "here", download_from_s3=True, s3_bucket=s3[1]))
    assert content(tmp_path / "here") == content(local.output_dir)
    assert "index.jsonl has not the SHA-256" in capsys.readouterr().out
    assert read_jsonl(tmp_path / "here/index.jsonl", "")[0]["paper_id"] == "train_0"
