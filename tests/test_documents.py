"""The documents of a corpus: each once, whatever the files are cut into, and in an order that (files, seed) decide."""

import errno
import gzip
import io
import json
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from text import documents as real_documents

import lm.corpus
import lm.documents
import lm.records
from lm.corpus import digest, find_files, hub_files, kind_of, read_manifest
from lm.documents import Piece, Reading, cut, documents, where

TEXTS = [f"{number} {text}" for number, text in enumerate(real_documents()[:60])]
IN_ORDER = Reading(shuffle_window=0)


def compress(path, content: bytes):
    kind = "zstd" if path.suffix == ".zst" else "gzip"
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), kind) as file:
        file.write(content)
    return path


def jsonl(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def dolma(texts) -> bytes:
    """JSON Lines with the fields of Dolma's files."""
    about = {"source": "wiki", "added": "2023-04-11T09:57:57.032Z", "created": None, "metadata": {"text": "no document"}}
    return "".join(json.dumps({"id": str(i), "text": text} | about) + "\n" for i, text in enumerate(texts)).encode()


def texts_of(names, reading=IN_ORDER) -> list[str]:
    """The texts of a corpus that has no bad document."""
    pieces = cut(find_files([str(name) for name in names]), reading)
    found = list(chain.from_iterable(documents(piece, number, reading) for number, piece in enumerate(pieces)))
    assert [document.fault for document in found] == [None] * len(found)
    return [document.text for document in found]


def faults_of(path, reading=IN_ORDER) -> list[tuple[str, str]]:
    """Place and fault of every bad document of one file."""
    (piece,) = cut(find_files([str(path)]), reading)
    return [(where(piece, document), document.fault) for document in documents(piece, 0, reading) if document.fault]


def test_files_as_of_dolma_are_json_lines_in_gzip(tmp_path):
    """One .json.gz has a record on each line, in as many gzip members as were joined."""
    (tmp_path / "v1_6-0000.json.gz").write_bytes(gzip.compress(dolma(TEXTS[:7])) + gzip.compress(dolma(TEXTS[7:])))
    assert texts_of([tmp_path]) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"n": range(60), "text": TEXTS}), path, row_group_size=7)
    elif path.suffix in (".gz", ".zst"):
        compress(path, jsonl(TEXTS))
    else:
        path.write_bytes(jsonl(TEXTS))
    assert texts_of([path]) == TEXTS


def test_text_files_are_documents_paragraphs_or_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \n\nthree\n")
    compress(tmp_path / "b.txt.zst", b"four")
    (tmp_path / "c.md").write_text("five")
    assert texts_of([tmp_path]) == ["one\ntwo\n\n \n\nthree\n", "four", "five"]
    paragraphs = Reading(text_unit="paragraph", shuffle_window=0)
    assert texts_of([tmp_path], paragraphs) == ["one\ntwo\n", "three\n", "four", "five"]
    assert texts_of([tmp_path], Reading(text_unit="line", shuffle_window=0)) == ["one\n", "two\n", "three\n", "four", "five"]


def test_compressed_members_one_after_another_are_all_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(TEXTS[:3])) + gzip.compress(jsonl(TEXTS[3:5])))
    assert texts_of([tmp_path / "a.jsonl.gz"]) == TEXTS[:5]


@pytest.mark.parametrize("piece_bytes", [1, 100, 3000, 3100, 10_000, 10**6])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_large_files_cut_anywhere_give_every_document_once_in_order(tmp_path, monkeypatch, piece_bytes, end):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:20]).rstrip(b"\n") + end)
    pq.write_table(pa.table({"text": TEXTS[20:40]}), tmp_path / "b.parquet", row_group_size=3)
    (tmp_path / "c.jsonl").write_bytes(jsonl(TEXTS[40:]))
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", piece_bytes)
    assert texts_of([tmp_path]) == TEXTS
    pieces = cut(find_files([str(tmp_path)]), IN_ORDER)
    assert (len(pieces) == 1) == (piece_bytes == 10**6)


def test_the_parts_of_a_file_are_of_one_size(tmp_path, monkeypatch):
    """A remainder of a few bytes could come first, and would have no held-out text."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:10]))
    size = (tmp_path / "a.jsonl").stat().st_size
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", size // 3 - 1)
    assert {piece.size for piece in cut(find_files([str(tmp_path)]), IN_ORDER)} == {size // 4}


def test_small_files_are_read_together(tmp_path, monkeypatch):
    for number in range(25):
        (tmp_path / f"{number:02}.txt").write_text(f"document {number}")
    monkeypatch.setattr(lm.documents, "FILES_IN_A_PIECE", 10)
    assert [len(piece.files) for piece in cut(find_files([str(tmp_path)]), IN_ORDER)] == [10, 10, 5]
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 50)
    assert [len(piece.files) for piece in cut(find_files([str(tmp_path)]), IN_ORDER)] == [5, 5, 4, 4, 4, 3]


def test_the_order_is_a_function_of_the_seed_and_mixes_files_and_documents(tmp_path, monkeypatch):
    for number in range(6):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(TEXTS[number * 10 : number * 10 + 10]))
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 40_000)
    orders = [texts_of([tmp_path], Reading(seed=seed, shuffle_window=7)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == sorted(TEXTS)
        numbers = np.array([int(text.split()[0]) for text in order]).reshape(6, 10)
        assert all(len(set(row // 10)) == 1 for row in numbers)  # a file is read on its own
        assert (numbers // 10)[:, 0].tolist() != list(range(6))
        assert all(row.tolist() != sorted(row) for row in numbers)
        assert all(sorted(row[:7] % 10) == list(range(7)) for row in numbers)  # and shuffled in windows


@pytest.mark.parametrize("window", [0, 1, 7, 1000])
def test_reading_goes_on_from_any_place(tmp_path, window):
    path, reading = tmp_path / "a.jsonl", Reading(seed=3, shuffle_window=window)
    path.write_bytes(jsonl(TEXTS[:30]))
    (piece,) = cut(find_files([str(path)]), reading)
    whole = [document.text for document in documents(piece, 0, reading)]
    for skip in (0, 1, 6, 7, 8, 14, 29, 30):
        assert [document.text for document in documents(piece, 0, reading, skip)] == whole[skip:]


def test_a_window_is_bounded_in_bytes(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS[:20]))
    monkeypatch.setattr(lm.documents, "WINDOW_BYTES", 9000)
    numbers = [int(text.split()[0]) for text in texts_of([path], Reading(seed=1, shuffle_window=1000))]
    assert numbers != list(range(20))
    assert [sorted(numbers[i : i + 3]) for i in range(0, 18, 3)] == [[i, i + 1, i + 2] for i in range(0, 18, 3)]


def test_bad_lines_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "good"}', b"{no json", b"", b'["text"]', b'{"body": "x"}', b'{"text": 7}', b'{"text": null}']
    lines += [b'{"text": "\\ud800"}', b'{"text": "\xff"}', b'{"text": " \\n"}', b'{"score": NaN, "text": "also good"}']
    path.write_bytes(b"\n".join(lines))
    assert faults_of(path) == [
        (f"{path} line 2", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        (f"{path} line 4", "without text"),
        (f"{path} line 5", "without text"),
        (f"{path} line 6", "no string (7)"),
        (f"{path} line 7", "no string (None)"),
        (f"{path} line 8", "not Unicode"),
        (f"{path} line 9", "not JSON ('utf-8' codec can't decode byte 0xff in position 10: invalid start byte)"),
        (f"{path} line 10", "empty"),
    ]
    (piece,) = cut(find_files([str(path)]), IN_ORDER)
    assert [document.text for document in documents(piece, 0, IN_ORDER) if not document.fault] == ["good", "also good"]


@pytest.mark.parametrize("piece_bytes", [1000, 3033, 10_000])
def test_a_bad_line_is_named_by_its_line_in_the_whole_file(tmp_path, monkeypatch, piece_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(TEXTS[:9]) + b"{\n" + jsonl(TEXTS[9:12]))
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", piece_bytes)
    pieces = cut(find_files([str(path)]), IN_ORDER)
    found = [(piece, doc) for number, piece in enumerate(pieces) for doc in documents(piece, number, IN_ORDER) if doc.fault]
    assert [where(piece, document) for piece, document in found] == [f"{path} line 10"]


def test_bad_values_in_other_formats_are_named(tmp_path):
    rows = pa.table({"text": pa.array([b"good", None, b"\xff\xfe", b""], pa.binary())})
    pq.write_table(rows, tmp_path / "a.parquet")
    assert faults_of(tmp_path / "a.parquet") == [
        (f"{tmp_path}/a.parquet row 2", "not UTF-8"),
        (f"{tmp_path}/a.parquet row 3", "not UTF-8"),
        (f"{tmp_path}/a.parquet row 4", "empty"),
    ]
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert faults_of(tmp_path / "b.txt") == [(f"{tmp_path}/b.txt", "not UTF-8")]
    with pytest.raises(ValueError, match=r"a.parquet has no column body \(found: text\): pass --text_column"):
        faults_of(tmp_path / "a.parquet", Reading(text_column="body", shuffle_window=0))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_compressed_file_is_named_where_it_breaks(tmp_path, suffix, damage):
    path = compress(tmp_path / f"a.jsonl{suffix}", jsonl(TEXTS))
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    (piece,) = cut(find_files([str(path)]), IN_ORDER)
    found = list(documents(piece, 0, IN_ORDER))
    good = [document.text for document in found if not document.fault]
    assert good == TEXTS[: len(good)]
    assert found[-1].fault.startswith("damaged (")
    assert where(piece, found[-1]) == f"{path} line {len(found)}"


def test_a_damaged_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    (place, fault), *others = faults_of(tmp_path / "a.parquet")
    assert (place, others) == (f"{tmp_path}/a.parquet row 1", [])
    assert fault.startswith("damaged (Parquet magic bytes not found in footer")


def test_a_document_that_is_too_long_is_passed_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lm.records, "MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["short", "x" * 3_000_000, "short too"]))
    assert faults_of(path) == [(f"{path} line 2", "longer than 0 MB")]
    (piece,) = cut(find_files([str(path)]), IN_ORDER)
    assert [document.text for document in documents(piece, 0, IN_ORDER)] == ["short", None, "short too"]
    (tmp_path / "b.txt").write_text("x" * 101)
    assert faults_of(tmp_path / "b.txt") == [(f"{tmp_path}/b.txt", "longer than 0 MB")]
    (tmp_path / "c.txt").write_text("a\n\n" + "x" * 60 + "\n" + "y" * 60 + "\n\nb\n")
    unit = Reading(text_unit="paragraph", shuffle_window=0)
    assert faults_of(tmp_path / "c.txt", unit) == [(f"{tmp_path}/c.txt line 3", "longer than 0 MB")]


def test_a_missing_file_is_no_damage(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:2]))
    (piece,) = cut(find_files([str(tmp_path)]), IN_ORDER)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        list(documents(piece, 0, IN_ORDER))


def test_files_are_found_by_name_folder_and_pattern_each_once(tmp_path):
    names = ["b/2.jsonl.gz", "b/1.jsonl", "a.parquet", "a.txt", "notes.docx", "a.parquet.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12")
    found = [file.name for file in find_files([f"{tmp_path}/*.txt", f"{tmp_path}/b/..", f"{tmp_path}/**/*.jsonl"])]
    assert found == [f"{tmp_path}/{name}" for name in ("a.txt", "a.parquet", "b/1.jsonl", "b/2.jsonl.gz")]
    assert [kind_of(name) for name in names] == ["jsonl", "jsonl", "parquet", "text", None, None]
    with pytest.raises(FileNotFoundError, match=r"no file .*/x\*: pass files or folders"):
        find_files([f"{tmp_path}/x*"])
    with pytest.raises(ValueError, match=r"notes.docx is of no kind that can be read \(.jsonl, .json, .parquet, .txt, .md"):
        find_files([f"{tmp_path}/notes.docx"])


def test_a_large_parquet_file_that_is_damaged_or_empty_is_cut_as_one_and_named_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 100)  # as 64 MB
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=len(TEXTS) // 3)
    assert len(cut(find_files([str(path)]), Reading(shuffle_window=0))) > 2
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (piece,) = cut(find_files([str(path)]), Reading(shuffle_window=0))
    assert (piece.files, piece.start, piece.stop) == ((str(path),), 0, None)
    (place, fault), *others = faults_of(path)
    assert (place, fault[:9], others) == (f"{path} row 1", "damaged (", [])
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    pq.ParquetWriter(path, pa.schema({"text": pa.string()}, metadata={"why": "x" * 200})).close()  # no row group
    (piece,) = cut(find_files([str(path)]), Reading(shuffle_window=0))
    assert list(documents(piece, 0, Reading(shuffle_window=0))) == []


def test_names_in_a_manifest_that_no_file_can_have_are_named_with_their_line(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.docx").write_text("a")
    for name in ("x" * 5000, "a\0.txt", "a.txt/b.txt"):
        (tmp_path / "manifest").write_text(f"a.txt\n{name}\n")
        with pytest.raises(ValueError, match=r"manifest line 2: no file .*: mend the line"):
            read_manifest(tmp_path / "manifest")
    (tmp_path / "manifest").write_text("a.txt\na.docx\n")
    with pytest.raises(ValueError, match=r"manifest line 2: .*/a.docx is of no kind that can be read"):
        read_manifest(tmp_path / "manifest")


def test_a_manifest_lists_files_beside_it_or_anywhere(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(name)
    manifest = tmp_path / "shards.txt"
    manifest.write_text(f"texts/b.txt\n\n  {tmp_path}/texts/a.txt \n")
    assert [file.name for file in read_manifest(manifest)] == [f"{tmp_path}/texts/b.txt", f"{tmp_path}/texts/a.txt"]
    manifest.write_text("texts/b.txt\ntexts/c.txt\n")
    with pytest.raises(ValueError, match=r"shards.txt line 2: no file .*/texts/c.txt: mend the line"):
        read_manifest(manifest)
    manifest.write_text("texts/b.txt\ntexts/a.txt\ntexts/b.txt\n")
    with pytest.raises(ValueError, match=r"shards.txt line 3: .*/texts/b.txt again, line 1 lists it: remove one"):
        read_manifest(manifest)
    manifest.write_bytes(b"\xef\xbb\xbftexts/../texts/a.txt\r\n")
    assert [file.name for file in read_manifest(manifest)] == [f"{tmp_path}/texts/a.txt"]
    manifest.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="shards.txt is not UTF-8"):
        read_manifest(manifest)
    manifest.write_text("\n")
    with pytest.raises(ValueError, match="shards.txt lists no file"):
        read_manifest(manifest)
    with pytest.raises(FileNotFoundError, match="no manifest"):
        read_manifest(tmp_path / "none.txt")


def test_all_bad_lines_of_a_manifest_are_named_together(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub.txt").mkdir(parents=True)
    for name, text in {"corpus/a.txt": "a", "corpus/empty.txt": "", "corpus/a.docx": "a", "beside.txt": "b"}.items():
        (tmp_path / name).write_text(text)
    manifest = folder / "list"
    lines = ["a.txt", "gone.txt", "sub.txt", "empty.txt", "sub.txt/../../beside.txt", "./a.txt", "a.docx"]
    manifest.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="list line 2") as caught:
        read_manifest(manifest)
    assert str(caught.value).splitlines() == [
        f"{manifest} line 2: no file {folder}/gone.txt: mend the line, or fetch the file",
        f"{manifest} line 3: {folder}/sub.txt is a folder: list the files in it",
        f"{manifest} line 4: {folder}/empty.txt is empty: remove the line, or let what writes the file finish",
        f"{manifest} line 5: sub.txt/../../beside.txt leaves the manifest's folder: write the whole path, or put the manifest"
        " above its files",
        f"{manifest} line 6: {folder}/a.txt again, line 1 lists it: remove one",
        f"{manifest} line 7: {folder}/a.docx is of no kind that can be read (.jsonl, .json, .parquet, .txt, .md, all but"
        " .parquet also with .gz or .zst): leave it out, or name it for what it is",
    ]
    manifest.write_text("a.txt\n" + "gone.txt\n" * 50)
    with pytest.raises(ValueError, match=r"line 21: no file .*\nand 30 more lines$") as caught:
        read_manifest(manifest)
    assert len(str(caught.value).splitlines()) == 21
    manifest.write_text(f"{tmp_path}/beside.txt\na.txt\n")
    assert [file.name for file in read_manifest(manifest)] == [f"{tmp_path}/beside.txt", f"{folder}/a.txt"]


def test_a_file_of_two_names_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").hardlink_to(tmp_path / "a.txt")
    (tmp_path / "list").write_text("b.txt\na.txt\n")
    assert [file.name for file in read_manifest(tmp_path / "list")] == [f"{tmp_path}/b.txt"]


def test_meta_json_of_a_folder_is_no_text_unless_it_is_named(tmp_path):
    for name in ("meta.json", "train.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert [file.name for file in find_files([str(tmp_path)])] == [f"{tmp_path}/train.jsonl"]
    assert [file.name for file in find_files([f"{tmp_path}/meta.json"])] == [f"{tmp_path}/meta.json"]


def test_the_digest_tells_a_changed_file_but_not_a_moved_folder(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a.txt").write_text("text")
    before = digest(find_files([str(tmp_path / "one")]))
    (tmp_path / "one").rename(tmp_path / "two")
    assert digest(find_files([str(tmp_path / "two")])) == before
    (tmp_path / "two/a.txt").write_text("changed")
    assert digest(find_files([str(tmp_path / "two")])) != before


def test_a_hub_dataset_out_of_reach_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"the hub gave no dataset 'allenai/c4' \(en\) .*: connect to the hub"):
        hub_files("allenai/c4", "en", None, "train", "--split")


def test_a_large_text_file_of_paragraphs_is_not_cut(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 5)
    assert texts_of([tmp_path / "a.txt"], Reading(text_unit="paragraph", shuffle_window=0)) == ["one\ntwo\n", "three\n"]
    assert texts_of([tmp_path / "a.txt"]) == ["one\ntwo\n\nthree\n"]


def test_a_byte_order_mark_and_windows_line_ends_change_no_json_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(TEXTS[:5]).replace(b"\n", b"\r\n"))
    assert texts_of([tmp_path / "a.jsonl"]) == TEXTS[:5]


def test_each_window_of_each_piece_has_an_order_of_its_own(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(TEXTS[number * 30 : number * 30 + 30]))
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 100_000)
    numbers = [int(text.split()[0]) for text in texts_of([tmp_path], Reading(shuffle_window=15))]
    orders = [tuple(number % 15 for number in numbers[first : first + 15]) for first in range(0, 60, 15)]
    assert [sorted(order) for order in orders] == [list(range(15))] * 4
    assert len(set(orders)) == 4


@pytest.mark.parametrize("piece_bytes", [10_000, 40_000])
def test_a_document_that_is_too_long_hides_and_doubles_no_other(tmp_path, monkeypatch, piece_bytes):
    by_a_byte = "z" * (4001 - len(jsonl([""])))
    texts = ["short", "x" * 1_200_000, *TEXTS[:9], by_a_byte, "y" * 5000, "short too"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    monkeypatch.setattr(lm.records, "MAX_DOCUMENT_BYTES", 4000)
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", piece_bytes)
    pieces = cut(find_files([str(tmp_path)]), IN_ORDER)
    found = [document.text for number, piece in enumerate(pieces) for document in documents(piece, number, IN_ORDER)]
    assert found == [text if len(jsonl([text])) <= 4000 else None for text in texts]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_disk_that_fails_is_no_damaged_file(tmp_path, monkeypatch, name):
    """Left out and counted as damage, what it could not read would be missed by nobody."""
    path = tmp_path / name
    compress(path, jsonl(TEXTS)) if name.endswith("gz") else path.write_bytes(jsonl(TEXTS))
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": TEXTS}), path)

    class Failing(io.FileIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    for module in (lm.corpus, lm.records):
        monkeypatch.setattr(module, "open_bytes", lambda name: io.BufferedReader(Failing(name)))
    with pytest.raises(OSError, match="Input/output error"):
        list(documents(Piece((str(path),), 1), 0, IN_ORDER))


def test_a_file_by_two_names_is_one_and_a_name_may_have_brackets(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a[1].txt")
    assert [file.name for file in find_files([f"{tmp_path}/a[1].txt", str(tmp_path)])] == [f"{tmp_path}/a[1].txt"]


def test_a_parquet_column_of_numbers_is_no_damage(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has int64 in column text, text is needed: pass --text_column"):
        faults_of(tmp_path / "a.parquet")


def test_a_compressed_file_of_no_bytes_and_json_too_deep_are_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    assert faults_of(tmp_path / "a.jsonl.gz") == [(f"{tmp_path}/a.jsonl.gz line 1", "damaged (no bytes)")]
    (tmp_path / "b.jsonl").write_text('{"text": "a", "x": ' + "[" * 5000 + "]" * 5000 + "}\n")
    ((place, fault),) = faults_of(tmp_path / "b.jsonl")
    assert place.endswith("b.jsonl line 1")
    assert fault.startswith("not JSON (")
