"""What lies in a file of a corpus, document by document, undecoded, in bounded memory."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lm.corpus import HUB, compression_of, kind_of, open_bytes, open_stream

MAX_DOCUMENT_BYTES = 64 * 2**20  # a longer one would have to be tokenised in one go

TextUnit = Literal["file", "paragraph", "line"]
Contents = Iterator[tuple[int, bytes | None]]  # line or row, from 1 (0: the whole file); None for what is too long


class Record(NamedTuple):
    """One document as it lies in its file, or what is wrong with the file from here on."""

    file: str
    number: int  # line or row within what is read of the file, from 1; 0 for a whole file
    content: bytes | None
    fault: str | None = None


def records(file: str, start: int, stop: int | None, text_column: str, text_unit: TextUnit) -> Iterator[Record]:
    """The records of one file; of a part of it, the lines that begin in [start, stop), or these row groups.

    A damaged file gives what can be read, and then a record with the fault.
    Raises: OSError if disk or network fail; ValueError if a Parquet file lacks the column.
    """
    number, kind = 0, kind_of(file)
    try:
        if compression_of(file) and not file.startswith(HUB) and not Path(file).stat().st_size:
            raise pa.ArrowInvalid("no bytes")  # a download that failed: even nothing is compressed to something
        if kind == "parquet":
            contents = _rows(file, start, stop, text_column)
        else:
            contents = _texts(file, start, stop, "line" if kind == "jsonl" else text_unit)
        for number, content in contents:
            if content is None:
                yield Record(file, number, None, f"longer than {MAX_DOCUMENT_BYTES // 2**20} MB")
            elif kind == "parquet" or not number or content.strip():  # blank lines are between documents
                yield Record(file, number, content)
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield Record(file, number + 1, None, f"damaged ({error})")


def is_damage(error: Exception) -> bool:
    """Whether bytes are wrong, not the disk or the network: that is Arrow's own error, or a plain OSError of its."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)


def place(record: Record, start: int) -> str:
    """The file and line of a record, for a message; the lines before a part are counted only now."""
    if not record.number:
        return record.file
    if kind_of(record.file) == "parquet":
        return f"{record.file} row {record.number}" + (f" from row group {start} on" if start else "")
    before = 0
    if start:
        with open_bytes(record.file) as stream:
            while stream.tell() < start:
                part = stream.read(min(2**20, start - stream.tell()))
                before += part.count(b"\n")
        before += not part.endswith(b"\n")  # the line that begins before the part and ends in it
    return f"{record.file} line {before + record.number}"


def _texts(file: str, start: int, stop: int | None, unit: TextUnit) -> Contents:
    with open_stream(file) as stream:
        if unit == "file":
            content = stream.read(MAX_DOCUMENT_BYTES + 1)
            yield 0, content if len(content) <= MAX_DOCUMENT_BYTES else None
        elif unit == "paragraph":
            yield from _paragraphs(_lines(stream, 0, None))
        else:
            yield from _lines(stream, start, stop)


def _lines(stream: BinaryIO, start: int, stop: int | None) -> Contents:
    at = start
    if start:  # the line that begins before belongs to the part before
        stream.seek(start - 1)
        at += _pass_line(stream) - 1
    for number in itertools.count(1):
        if stop is not None and at >= stop:
            return
        line = stream.readline(MAX_DOCUMENT_BYTES + 1)
        at += len(line)
        if not line:
            return
        if len(line) <= MAX_DOCUMENT_BYTES:
            yield number, line
        else:
            at += 0 if line.endswith(b"\n") else _pass_line(stream)
            yield number, None


def _pass_line(stream: BinaryIO) -> int:
    """Read on to the next line; returns the bytes that were passed."""
    passed = 0
    while part := stream.readline(2**20):
        passed += len(part)
        if part.endswith(b"\n"):
            break
    return passed


def _paragraphs(lines: Contents) -> Contents:
    """Runs of lines between blank ones, each with the number of its first line."""
    for blank, run in itertools.groupby(lines, lambda line: line[1] is not None and not line[1].strip()):
        if blank:
            continue
        first, parts, size = 0, [], 0
        for number, line in run:
            first = first or number
            size += MAX_DOCUMENT_BYTES + 1 if line is None else len(line)
            if size <= MAX_DOCUMENT_BYTES:
                parts.append(line)
        yield first, b"".join(parts) if size <= MAX_DOCUMENT_BYTES else None


def _rows(file: str, start: int, stop: int | None, column: str) -> Contents:
    """The text column's values as bytes; a null, which is no text, comes as a byte that is none either."""
    with open_bytes(file) as stream:
        table = pq.ParquetFile(stream)
        if column not in table.schema_arrow.names:
            found = ", ".join(table.schema_arrow.names)
            raise ValueError(f"{file} has no column {column} (found: {found}): pass --text_column")
        groups = list(range(start, table.num_row_groups if stop is None else stop))
        number = itertools.count(1)
        for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
            try:
                values = batch.column(0).cast(pa.large_binary())  # looks at no byte
            except pa.ArrowNotImplementedError:
                found = batch.column(0).type
                raise ValueError(f"{file} has {found} in column {column}, text is needed: pass --text_column") from None
            for value in values.to_pylist():
                content = b"\xff" if value is None else value
                yield next(number), content if len(content) <= MAX_DOCUMENT_BYTES else None
