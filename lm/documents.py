"""Documents of a corpus in an order that is a function of (files, seed): the same from any place on, in any process.

The files are cut into pieces of some 64 MB that can be read independently of each other: a run of small files, or a part of a
large one, or a large one that is compressed and so cannot be entered in the middle. With `shuffle_window` the pieces come in
random order, and the documents of a piece too, within a window that is read into memory.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from lm import draws
from lm.characters import simplify
from lm.corpus import File, compression_of, kind_of, open_bytes
from lm.records import Record, TextUnit, is_damage, place, records

PIECE_BYTES = 64 * 2**20  # on the disk
FILES_IN_A_PIECE = 10_000
WINDOW_BYTES = 64 * 2**20  # of documents that are shuffled together, however few they are
EMPTY = "empty"  # the one fault that is no error


@dataclass(frozen=True)
class Reading:
    """How files become documents, and in which order."""

    text_column: str = "text"
    text_unit: TextUnit = "file"
    seed: int = 0
    shuffle_window: int = 10_000  # documents; 0 keeps the order of the files
    prepare: str | None = None  # what the tokenizer needs done to a text (lm/characters.py)


@dataclass(frozen=True)
class Piece:
    """What one process reads: whole files, or of one file the lines that begin in [start, stop), or these row groups."""

    files: tuple[str, ...]
    size: int  # bytes on the disk, about
    start: int = 0
    stop: int | None = None


class Document(NamedTuple):
    """One document, or why there is none."""

    text: str | None
    fault: str | None
    record: Record


def cut(files: Sequence[File], reading: Reading) -> list[Piece]:
    """The pieces of a corpus in the order in which they are packed."""
    pieces: list[Piece] = []
    run, size = [], 0  # small files that are read together
    for file in [*files, None]:
        parts = _parts(file, reading) if file else []
        if run and (not file or parts or size + _size(file) > PIECE_BYTES or len(run) == FILES_IN_A_PIECE):
            pieces.append(Piece(tuple(run), size))
            run, size = [], 0
        pieces += parts
        if file and not parts:
            run.append(file.name)
            size += _size(file)
    if not reading.shuffle_window:
        return pieces
    return [pieces[i] for i in draws.permutation(reading.seed, "pieces", len(pieces))]


def _size(file: File) -> int:
    return PIECE_BYTES if file.size is None else file.size


def _parts(file: File, reading: Reading) -> list[Piece]:
    """A large file in parts, as far as it can be entered in the middle."""
    kind = kind_of(file.name)
    if _size(file) <= PIECE_BYTES or compression_of(file.name):
        return []
    count, length = -(-file.size // PIECE_BYTES), file.size
    if kind == "parquet":
        length = _row_groups(file.name)
        count = min(count, length)
    elif kind != "jsonl" and reading.text_unit != "line":
        return []
    if not count:  # it has no row group, or is damaged, which is said when it is read
        return []
    cuts = [length * i // count for i in range(count + 1)]
    return [Piece((file.name,), file.size // count, *ends) for ends in itertools.pairwise(cuts)]


def _row_groups(file: str) -> int:
    """How many row groups a Parquet file has, 0 if that cannot be read."""
    try:
        with open_bytes(file) as stream:
            return pq.ParquetFile(stream).metadata.num_row_groups
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        return 0


def documents(piece: Piece, number: int, reading: Reading, skip: int = 0) -> Iterator[Document]:
    """The documents of the piece that is `number` in its corpus, after the first `skip`; bad ones with their fault."""
    found = itertools.chain.from_iterable(
        records(file, piece.start, piece.stop, reading.text_column, reading.text_unit) for file in piece.files
    )
    for record in _ordered(found, number, reading, skip):
        text, fault = _text_of(record, reading.text_column)
        if text and reading.prepare:
            text = simplify(text)
        if text is not None and (not text or text.isspace()):
            text, fault = None, EMPTY
        yield Document(text, fault, record)


def where(piece: Piece, document: Document) -> str:
    """The file and line of a document, for a message."""
    return place(document.record, piece.start)


def _ordered(found: Iterator[Record], number: int, reading: Reading, skip: int) -> Iterator[Record]:
    if not reading.shuffle_window:
        yield from itertools.islice(found, skip, None)
        return
    for count, window in enumerate(_windows(found, reading.shuffle_window)):
        if skip < len(window):
            order = draws.permutation(reading.seed, f"documents/{number}/{count}", len(window))
            yield from (window[i] for i in order[skip:])
        skip = max(skip - len(window), 0)


def _windows(found: Iterator[Record], most: int) -> Iterator[list[Record]]:
    window, size = [], 0
    for record in found:
        window.append(record)
        size += len(record.content or b"")
        if len(window) == most or size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def _text_of(record: Record, column: str) -> tuple[str | None, str | None]:
    """The text of a record, or what is wrong with it."""
    if record.content is None:
        return None, record.fault
    if kind_of(record.file) == "jsonl":
        row, fault = _json(record.content)
        if fault:
            return None, fault
        if not isinstance(row, dict) or column not in row:
            return None, f"without {column}"
        text = row[column]
        if not isinstance(text, str):
            return None, f"no string ({text!r:.60})"
        if not text.isascii() and not _is_unicode(text):
            return None, "not Unicode"
    else:
        try:
            text = record.content.decode()
        except UnicodeDecodeError:
            return None, "not UTF-8"
    return text, None


def _json(line: bytes) -> tuple[Any, str | None]:
    try:
        return orjson.loads(line), None
    except orjson.JSONDecodeError:
        pass  # NaN, which Python writes, or half a surrogate pair in another column than the text
    try:
        return json.loads(line.decode("utf-8-sig")), None
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
