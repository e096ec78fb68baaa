"""lm/splits.py: held-out sets are opened only when whole, of the run's task and generator, and without a common prompt."""

import json
import re
import shutil
from pathlib import Path

import pytest
from damage import change_meta, flip, list_again

from build_data_splits import Args, build
from lm.files import read_jsonl, read_sealed, sha256
from lm.graph_search import Task
from lm.graph_text import fingerprint, prompt_digest
from lm.splits import SETS, identify, read_splits, splits_folder

AGAIN = ": remove the folder and run build_data_splits.py again"
GENERATOR = "the held-out sets would be of another distribution: pass the same --generator, or build the sets with it"
SIZES = {"eval": 12, "test": 15, "mixin": 30}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Small held-out sets; not to be changed."""
    sizes = {f"{name}_size": size for name, size in SIZES.items()}
    scratch = tmp_path_factory.mktemp("scratch")
    args = Args(scratch_dir=scratch, max_input_size=24, max_lookahead=4, num_processes=1, **sizes)
    build(args, scratch / "sets")
    return scratch / "sets"


@pytest.fixture
def folder(built, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(built, tmp_path / "sets"))


def replace_lines(folder: Path, name: str, lines: list) -> None:
    """Write other rows (or raw lines) with the checksum and size that belong to them; the count stays."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / f"{name}.jsonl").write_text(text)
    list_again(folder, f"{name}.jsonl")


def refused(folder: Path, *faults: str, **asked) -> None:
    """Reading says exactly these faults, a line for each."""
    with pytest.raises(ValueError, match="^" + re.escape("\n".join(faults)) + "$"):
        read_splits(folder, **asked)


def test_rows_and_reserved_prompts_are_those_of_all_three_files(built):
    splits = read_splits(built, max_input_size=24, max_lookahead=4)
    rows = {name: read_jsonl(built / f"{name}.jsonl", "") for name in SETS}
    assert {name: splits.rows(name) for name in SETS} == rows
    assert {name: len(found) for name, found in rows.items()} == SIZES
    assert splits.reserved == {prompt_digest(row["input_text"]) for found in rows.values() for row in found}
    assert len(splits.reserved) == sum(SIZES.values())
    assert (splits.task, splits.folder) == (Task(24, 4), built)
    assert splits.meta == read_sealed(built / "meta.json", "")


def test_only_the_five_published_keys_are_needed(folder):
    rows = read_jsonl(folder / "eval.jsonl", "")
    published = [{key: row[key] for key in ("input_text", "output_texts", "alpha", "stage", "seed")} for row in rows]
    replace_lines(folder, "eval", published)
    assert read_splits(folder).rows("eval") == published


def test_what_is_unfinished_is_named_with_the_script_that_makes_it(folder):
    (folder / "meta.json").unlink()
    for missing in (folder, folder / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"^no {missing}/meta.json: run build_data_splits.py, or let it finish$"):
            read_splits(missing)


@pytest.mark.parametrize(
    ("meta", "faults"),
    [
        ([1], ["format [1], 'splits-2' is needed: make it again with build_data_splits.py"]),
        ({"format": "splits-1"}, ["format 'splits-1', 'splits-2' is needed: make it again with build_data_splits.py"]),
    ],
)
def test_another_meta_json_is_refused(meta, faults, folder):
    (folder / "meta.json").write_text(json.dumps(meta))
    refused(folder, *(f"{folder}/meta.json has {fault}" for fault in faults))


def test_values_of_meta_json_of_the_wrong_kind_are_named_together(folder):
    change_meta(folder, lambda meta: meta.update(max_input_size="24", max_lookahead=-1, generator=[], files=None))
    refused(
        folder,
        f"{folder}/meta.json has max_input_size '24', int is needed{AGAIN}",
        f"{folder}/meta.json has max_lookahead -1, 0 to 1048575 is needed{AGAIN}",
        f"{folder}/meta.json has generator [], dict is needed{AGAIN}",
        f"{folder}/meta.json has files None, dict is needed{AGAIN}",
    )


def test_meta_json_must_know_every_file(folder):
    def change(meta: dict) -> None:
        meta["generator"].clear()
        del meta["files"]["test.jsonl"]
        meta["files"]["mixin.jsonl"]["count"] = True
        meta["files"]["/etc/passwd"] = 3

    change_meta(folder, change)
    refused(
        folder,
        f"{folder}/meta.json generator has name None, str is needed{AGAIN}",
        f"{folder}/meta.json names '/etc/passwd', a file inside the folder is needed{AGAIN}",
        f"{folder}/meta.json does not list test.jsonl{AGAIN}",
        f"{folder}/meta.json mixin.jsonl has count True, int is needed{AGAIN}",
        f"{folder}/meta.json /etc/passwd is 3, an object is needed{AGAIN}",
    )


def test_a_task_that_cannot_be_is_refused(folder):
    change_meta(folder, lambda meta: meta.update(max_lookahead=0))
    refused(folder, f"{folder}/meta.json: --max_lookahead 0 is below 1: a search looks ahead at least one step{AGAIN}")


def test_a_changed_count_in_meta_json_is_named(folder):
    path = folder / "meta.json"
    path.write_text(path.read_text().replace('"num_redrawn": ', '"num_redrawn": 1'))
    with pytest.raises(ValueError, match=f"^{path} has changed since it was written: its SHA-256 is .* was written: make it"):
        read_splits(folder)


def test_sets_of_another_task_or_generator_are_refused_together(built):
    refused(
        built,
        f"--max_input_size 30, but {built} was built with 24: pass --max_input_size 24, or other held-out sets",
        f"--max_lookahead 5, but {built} was built with 4: pass --max_lookahead 4, or other held-out sets",
        f"{built} was built with generator built-in, the run's is other:Graphs; {GENERATOR}",
        max_input_size=30,
        max_lookahead=5,
        generator="other:Graphs",
    )


def test_a_generator_is_known_by_its_name_and_source(folder, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "identified_graphs.py"
    source.write_text("raise RuntimeError('it is not run')\n")
    there = {"name": "identified_graphs:Graphs", "fingerprint": sha256(source)}
    assert identify("identified_graphs:Graphs") == there
    assert identify(None) == {"name": "built-in", "fingerprint": fingerprint()}
    for unknown in ("not_there:Graphs", "not.there:Graphs", ":Graphs", "itertools:Graphs"):
        assert identify(unknown) == {"name": unknown, "fingerprint": None}

    change_meta(folder, lambda meta: meta.update(generator=there))
    assert read_splits(folder, generator="identified_graphs:Graphs").meta["generator"] == there
    refused(folder, f"{folder} was built with generator {there['name']}, the run's is built-in; {GENERATOR}")
    source.write_text("changed = True\n")
    refused(
        folder,
        f"{folder} was built with generator {there['name']} of fingerprint {there['fingerprint']}, "
        f"now it is {sha256(source)}; {GENERATOR}",
        generator="identified_graphs:Graphs",
    )
    source.unlink()
    assert read_splits(folder, generator="identified_graphs:Graphs").meta["generator"] == there, "as on a machine without it"


def test_missing_and_truncated_files_are_named_together(folder):
    sizes = {name: (folder / f"{name}.jsonl").stat().st_size for name in SETS}
    (folder / "eval.jsonl").unlink()
    with open(folder / "mixin.jsonl", "r+b") as file:
        file.truncate(100)
    refused(
        folder,
        f"{folder}/eval.jsonl is missing, {sizes['eval']} bytes are needed{AGAIN}",
        f"{folder}/mixin.jsonl has 100 bytes, {sizes['mixin']} bytes are needed{AGAIN}",
    )


def test_a_flipped_bit_is_named(folder):
    before = sha256(folder / "test.jsonl")
    flip(folder / "test.jsonl", 500)
    refused(folder, f"{folder}/test.jsonl has SHA-256 {sha256(folder / 'test.jsonl')}, {before} is needed{AGAIN}")


@pytest.mark.parametrize(
    ("row", "faults"),
    [
        ("[]", ["is [], not an object: make it again with build_data_splits.py"]),
        ({"input_text": None, "stage": 4.0}, ["has input_text None, str is needed", "has stage 4.0, int is needed"]),
        ({"seed": True, "alpha": "1"}, ["has alpha '1', float is needed", "has seed True, int is needed"]),
        ({"output_texts": []}, ["has output_texts [], one string or more are needed"]),
        ({"output_texts": ["obar", 5]}, ["has output_texts ['obar', 5], one string or more are needed"]),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(row, faults, folder):
    rows = read_jsonl(folder / "test.jsonl", "")
    rows[6] = row if isinstance(row, str) else rows[6] | row
    replace_lines(folder, "test", rows)
    ends = [fault if "make it again" in fault else fault + AGAIN for fault in faults]
    refused(folder, *(f"{folder}/test.jsonl line 7 {end}" for end in ends))


def test_another_number_of_rows_is_refused(folder):
    replace_lines(folder, "mixin", read_jsonl(folder / "mixin.jsonl", "")[:-1])
    refused(folder, f"{folder}/mixin.jsonl has 29 rows, 30 are needed{AGAIN}")


def test_prompts_that_stand_twice_are_counted_and_the_first_is_named(folder):
    rows = {name: read_jsonl(folder / f"{name}.jsonl", "") for name in SETS}
    for line, of_eval in ((20, 11), (7, 5), (9, 5)):  # the first of eval, not of mixin, is named
        rows["mixin"][line - 1]["input_text"] = rows["eval"][of_eval - 1]["input_text"]
    rows["test"][14]["input_text"] = rows["test"][2]["input_text"]
    for name in ("test", "mixin"):
        replace_lines(folder, name, rows[name])
    refused(
        folder,
        f"{folder}: test.jsonl repeats 1 prompts (first: lines 3 and 15){AGAIN}",
        f"{folder}: mixin.jsonl repeats 1 prompts (first: lines 7 and 9){AGAIN}",
        f"{folder}: eval.jsonl and mixin.jsonl share 2 prompts (first: eval line 5, mixin line 7){AGAIN}",
    )


def test_sets_of_every_task_seed_and_generator_have_a_folder_of_their_own():
    parts = Path("s/data/nl_splits")
    assert splits_folder("s", Task(384, 64), 12345) == parts / "mis384_look64_seed12345"
    assert splits_folder("s", Task(96, 16), 7, "package.module:Graphs") == parts / "mis96_look16_seed7_Graphs"
