"""The paper store: what is written is read back, and every kind of damage is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from damage import change_meta, flip, list_again
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lm.files import read_sealed, write_sealed
from lm.paper_writer import PaperWriter, move_into_place, stored
from lm.papers import read_papers

PAPERS = {"train": [("cs.CV", [1, 2, 3]), ("math.GR", [4, 5]), ("cs.CV", [6])], "validation": [("cs.CV", [7, 8, 9, 0])]}
HEADER = {"dtype": "uint16", "vocab_size": 10, "tokenizer": {"name": "t", "fingerprint": "f"}, "source": {"limit": 50}}


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE(vocab={str(i): i for i in range(10)}, merges=[]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def write(folder: Path, tokenizer, header: dict = HEADER) -> Path:
    writer = PaperWriter(folder, header, PAPERS)
    for split, papers in PAPERS.items():
        for category, ids in papers:
            writer.add(split, category, np.array(ids))
        writer.leave_out(split, "empty")
    writer.finish(tokenizer)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    return write(tmp_path_factory.mktemp("papers") / "whole", tokenizer)


@pytest.fixture
def store(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "store"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path: Path, old: str, new: str) -> None:
    """Replace text in a file, and set its size and checksum in meta.json right again."""
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    list_again(path.parent, path.name)


def test_papers_are_read_as_they_were_written(store):
    papers = read_papers(store, verify=True)
    assert papers.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert (type(papers.tokens), papers.tokens.dtype, papers.tokens.flags.writeable) == (np.ndarray, np.uint16, False)
    assert papers.paper_ids == ["train_0", "train_1", "train_2", "validation_0"]
    assert papers.category_names == ["cs.CV", "math.GR"]
    assert papers.categories.tolist() == [0, 1, 0, 0]
    assert papers.offsets.tolist() == [0, 3, 5, 6]
    assert papers.lengths.tolist() == [3, 2, 1, 4]
    assert {name: ids.tolist() for name, ids in papers.splits.items()} == {"train": [0, 1, 2], "validation": [3]}
    assert {array.dtype for array in (papers.categories, papers.offsets, papers.lengths, *papers.splits.values())} == {
        np.dtype("int64")
    }
    files = papers.meta.pop("files")
    counts = {"cs.CV": {"papers": 3, "tokens": 8}, "math.GR": {"papers": 1, "tokens": 2}}
    rest = {"num_tokens": 10, "num_papers": 4, "categories": counts, "left_out": {"empty": 2}}
    assert papers.meta == {"format": "papers-2", **HEADER, **rest}
    assert {name: (store / name).stat().st_size for name in files} == {name: f["size"] for name, f in files.items()}
    assert {"tokens.bin", "index.jsonl", "splits.json", "tokenizer/tokenizer.json"} <= files.keys()
    assert set(content(store)) == {*files, "meta.json"}


def test_ids_above_65535_are_stored_as_uint32(tmp_path, tokenizer):
    writer = PaperWriter(tmp_path, {**HEADER, "dtype": "uint32", "vocab_size": 100_000}, ["train"])
    writer.add("train", "cs.CV", np.array([70_000, 99_999], np.uint32))
    writer.finish(tokenizer)
    assert read_papers(tmp_path).tokens.tolist() == [70_000, 99_999]
    assert (tmp_path / "tokens.bin").read_bytes() == bytes.fromhex("701101009f860100")


@pytest.mark.parametrize("committed", [True, False])
def test_interrupted_writer_continues_at_its_last_commit(whole, tmp_path, tokenizer, committed):
    first = PaperWriter(tmp_path / "store", HEADER, PAPERS)
    first.add("train", *as_paper("train", 0))
    first.commit()
    first.add("train", *as_paper("train", 1))
    if committed:
        first.commit()
    first.close()
    second = PaperWriter(tmp_path / "store", HEADER, PAPERS)
    assert second.rows == {"train": 2 if committed else 1, "validation": 0}
    for split, papers in PAPERS.items():
        for row in range(second.rows[split], len(papers)):
            second.add(split, *as_paper(split, row))
        second.leave_out(split, "empty")
    second.finish(tokenizer)
    assert content(tmp_path / "store") == content(whole)


def as_paper(split: str, row: int) -> tuple[str, np.ndarray]:
    category, ids = PAPERS[split][row]
    return category, np.array(ids)


@pytest.mark.parametrize("moved", range(7))
def test_writer_killed_while_files_move_into_place_ends_the_same(whole, tmp_path, tokenizer, moved):
    """Whatever number of the files has been moved out of partial/, the next run moves the rest."""
    store = tmp_path / "store"
    shutil.copytree(whole, store / "partial")
    rest = {"rows": dict.fromkeys(PAPERS, 0), "tokens": 0, "index_bytes": 0, "left_out": {}}
    progress = {"format": "papers-2", **HEADER, **rest}
    write_sealed(store / "partial/progress.json", progress)
    names = [*read_sealed(whole / "meta.json", "")["files"], "meta.json"]
    for name in names[:moved]:
        (store / name).parent.mkdir(exist_ok=True)
        (store / "partial" / name).rename(store / name)
    if not stored(store)[1]:
        PaperWriter(store, HEADER, PAPERS).finish(tokenizer)
    assert content(store) == content(whole)


def test_meta_is_the_last_file_to_be_moved_into_place(whole, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(whole, store / "partial")
    (store / "splits.json/in the way").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        move_into_place(store / "partial", store)
    assert not (store / "meta.json").exists()


def test_other_data_is_refused_naming_every_difference(store, tmp_path):
    other = {**HEADER, "vocab_size": 11, "source": {"limit": 60}}
    PaperWriter(tmp_path / "unfinished", HEADER, ["train"]).commit()
    message = r"holds other data \(vocab_size: there 10, asked 11; source.limit: there 50, asked 60\): pass another"
    with pytest.raises(ValueError, match=message):
        PaperWriter(tmp_path / "unfinished", other, ["train"])
    with pytest.raises(ValueError, match="is finished, an unfinished one is needed"):
        PaperWriter(store, HEADER, PAPERS)
    (store / "meta.json").unlink()
    with pytest.raises(ValueError, match=r"holds tokens.bin, index.jsonl without meta.json .* of unknown origin"):
        PaperWriter(store, HEADER, PAPERS)


def test_two_writers_of_one_folder_are_refused(tmp_path):
    first = PaperWriter(tmp_path, HEADER, ["train"])
    with pytest.raises(RuntimeError, match="another process is writing"):
        PaperWriter(tmp_path, HEADER, ["train"])
    first.close()
    PaperWriter(tmp_path, HEADER, ["train"]).close()


def test_split_without_papers_is_refused(tmp_path, tokenizer):
    writer = PaperWriter(tmp_path, HEADER, PAPERS)
    writer.add("train", *as_paper("train", 0))
    writer.leave_out("validation", "empty")
    with pytest.raises(ValueError, match=r"no paper in validation \(left out: \{'empty': 1\}\), one is needed in each"):
        writer.finish(tokenizer)


def test_saved_progress_with_shorter_files_is_refused(tmp_path):
    writer = PaperWriter(tmp_path, HEADER, PAPERS)
    writer.add("train", *as_paper("train", 0))
    writer.commit()
    writer.close()
    (tmp_path / "partial/tokens.bin").write_bytes(b"12345")
    with pytest.raises(ValueError, match=r"tokens.bin has 5 bytes, 6 were saved: remove"):
        PaperWriter(tmp_path, HEADER, PAPERS)


def test_folder_without_meta_is_unfinished(store):
    (store / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*meta.json: run fetch_arxiv.py, or let it finish"):
        read_papers(store)


def test_truncated_tokens_are_named(store):
    (store / "tokens.bin").write_bytes((store / "tokens.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"tokens.bin has 18 bytes, 20 bytes are needed: remove the folder and run fetch"):
        read_papers(store)


def test_missing_files_are_named_together(store):
    (store / "splits.json").unlink()
    (store / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"splits.json is missing, \d+ bytes are needed: .*\n.*/tokenizer.json is missing"):
        read_papers(store)


NAMES = ["tokens.bin", "index.jsonl", "splits.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_byte_is_named(store, name):
    flip(store / name, 7)
    if name == "tokens.bin":  # large: of it only the size is looked at, unless it is asked for
        read_papers(store)
    with pytest.raises(ValueError, match=rf"{name} has SHA-256 [0-9a-f]{{64}}, [0-9a-f]{{64}} is needed: remove"):
        read_papers(store, verify=name == "tokens.bin")


def test_a_flipped_byte_in_a_count_of_meta_is_named(store):
    path = store / "meta.json"
    path.write_text(path.read_text().replace('"num_papers": 4', '"num_papers": 5'))
    with pytest.raises(ValueError, match=r"meta.json has changed since it was written: its SHA-256 is .*: make it again"):
        read_papers(store)


LINE_2 = '{"paper_id": "train_1", "category": "math.GR", "offset": 3, "length": 2}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE_2[:-1], "index.jsonl line 2 is not JSON"),
        ("[]", r"index.jsonl line 2 is \[\], not an object"),
        (LINE_2.replace('"length": 2', '"size": 2'), "line 2 has length None, int is needed"),
        (LINE_2.replace("3", "true"), "line 2 has offset True, int is needed"),
        (LINE_2.replace('"math.GR"', "4"), "line 2 has category 4, str is needed"),
        (LINE_2.replace("3", "2"), "line 2 has offset 2, 3 is needed, where the paper before it ends"),
        (LINE_2.replace("3", "4"), "line 2 has offset 4, 3 is needed"),
        (LINE_2.replace("3", "-3"), "line 2 has offset -3, 3 is needed"),
        (LINE_2.replace(": 2", ": -2"), "line 2 has length -2, at least 1 is needed"),
        (LINE_2.replace(": 2", ": 0"), "line 2 has length 0, at least 1 is needed"),
        (LINE_2.replace(": 2", ": 8"), "line 2 ends at token 11, tokens.bin has 10"),
        (LINE_2.replace("train_1", "train_0"), "line 2 has paper_id 'train_0' again, each is needed once"),
    ],
)
def test_bad_index_row_is_named(store, line, message):
    change(store / "index.jsonl", LINE_2, line)
    with pytest.raises(ValueError, match=rf"{message}.*: (remove the folder and run|make it again with) fetch_arxiv.py"):
        read_papers(store, verify=True)


def test_index_that_ends_early_is_named(store):
    change(store / "index.jsonl", '{"paper_id": "validation_0", "category": "cs.CV", "offset": 6, "length": 4}\n', "")
    with pytest.raises(ValueError, match=r"index.jsonl lists 3 papers of 6 tokens, 4 of 10 are needed"):
        read_papers(store)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ('"train_9"', "lists 'train_9' under train, which index.jsonl does not have"),
        ('"validation_0"', "lists 'validation_0' under train and under validation, once is needed"),
        ('"train_0"', "lists 'train_0' under train and under train, once is needed"),
    ],
)
def test_bad_split_is_named(store, new, message):
    change(store / "splits.json", '"train_1"', new)
    with pytest.raises(ValueError, match=f"splits.json {message}"):
        read_papers(store)


def test_paper_in_no_split_is_named(store):
    change(store / "splits.json", '"train_1",', "")
    with pytest.raises(ValueError, match=r"lists 3 papers, 'train_1' of index.jsonl is not among them"):
        read_papers(store)


def test_splits_of_another_shape_are_named(store):
    change(store / "splits.json", (store / "splits.json").read_text(), json.dumps({"train": "train_0"}))
    with pytest.raises(ValueError, match=r"splits.json is not an object of lists"):
        read_papers(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format="papers-1"), "has format 'papers-1', 'papers-2' is needed"),
        (lambda meta: meta.update(dtype="int16"), "has dtype 'int16', one of uint16, uint32 is needed"),
        (lambda meta: meta.update(dtype="uint32"), "gives tokens.bin 20 bytes, 10 tokens need 4 each"),
        (lambda meta: meta.pop("num_tokens"), "has num_tokens None, int is needed"),
        (lambda meta: meta.update(num_tokens=0), "has num_tokens 0, 1 to "),
        (lambda meta: meta.update(num_papers=True), "has num_papers True, int is needed"),
        (lambda meta: meta.update(vocab_size=65537), "has vocab_size 65537, uint16 holds 65536 ids"),
        (lambda meta: meta["tokenizer"].pop("fingerprint"), "tokenizer has fingerprint None, str is needed"),
        (lambda meta: meta["left_out"].update(empty=-1), "left_out has empty -1, 0 to "),
        (lambda meta: meta["files"].pop("index.jsonl"), "does not list index.jsonl"),
        (lambda meta: meta["files"]["splits.json"].update(size=True), "splits.json has size True, int is needed"),
        (lambda meta: meta["files"].update({"../x": meta["files"]["index.jsonl"]}), "names '../x', a file inside the folder"),
        (lambda meta: meta["files"].update({"x" * 5000: meta["files"]["index.jsonl"]}), "names 'xxx"),
    ],
)
def test_a_meta_that_is_wrong_is_named(store, change, message):
    change_meta(store, change)
    with pytest.raises(ValueError, match=rf"meta.json {message}"):
        read_papers(store)


def test_counts_of_categories_are_those_of_the_index(store):
    change_meta(store, lambda meta: meta["categories"]["cs.CV"].update(tokens=9))
    with pytest.raises(ValueError, match=r"index.jsonl has categories .*'tokens': 8.* are needed"):
        read_papers(store)


def test_a_meta_without_a_seal_is_refused(store):
    meta = json.loads((store / "meta.json").read_text())
    del meta["sha256"]
    (store / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="has no sha256 of itself .*its format is 'papers-2'.*, one is needed"):
        read_papers(store)


def test_a_file_that_is_a_link_out_of_the_folder_is_refused(store, tmp_path):
    (store / "index.jsonl").rename(tmp_path / "elsewhere")
    (store / "index.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"index.jsonl is a link to .*/elsewhere, a file inside the folder is needed"):
        read_papers(store)
    (tmp_path / "link").symlink_to(store, target_is_directory=True)
    (store / "index.jsonl").unlink()
    (tmp_path / "elsewhere").rename(store / "index.jsonl")
    read_papers(tmp_path / "link")  # the folder itself may be one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.update(tokens=-1), "has tokens -1, 0 to "),
        (lambda state: state["rows"].update(train="1"), "rows has train '1', int is needed"),
        (lambda state: state["rows"].pop("train"), "has splits validation, train, validation are needed"),
        (lambda state: state.update(format="papers-1"), "has format 'papers-1', 'papers-2' is needed"),
    ],
)
def test_saved_progress_that_is_wrong_is_named(tmp_path, change, message):
    writer = PaperWriter(tmp_path, HEADER, PAPERS)
    writer.commit()
    writer.close()
    change_meta(tmp_path / "partial", change, "progress.json")
    with pytest.raises(ValueError, match=f"progress.json {message}"):
        PaperWriter(tmp_path, HEADER, PAPERS)
    flip(tmp_path / "partial/progress.json", 20)
    with pytest.raises(ValueError, match="progress.json"):
        PaperWriter(tmp_path, HEADER, PAPERS)
