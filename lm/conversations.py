"""Conversations out of files: rows of "messages" read one by one, and what is wrong with a row said with its file and line."""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lm.corpus import File, find_files, hub_files, kind_of, open_bytes
from lm.files import parse_json
from lm.records import is_damage, place, records

Message = dict[str, str]
SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant")
NAMED = 20  # bad rows, in a message
COLUMN = "messages"


@dataclass
class Conversations:
    """Good conversations in the order of the files, and how many rows were left out for which reason."""

    rows: list[list[Message]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def find_conversations(name: str, split: str) -> list[File]:
    """The files of a path or pattern, of a split in a folder, or of a split of a dataset of the hub.

    Of a folder they are those whose names begin with the split, or all if no name begins with one.
    Raises: FileNotFoundError or ValueError if there are none, or some of text alone.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() and not kind_of(name):
        try:
            return hub_files(name, None, None, split, "--data_split")
        except RuntimeError as error:
            raise FileNotFoundError(f"no file {name}, and as a dataset: {error.__cause__!s:.300}: pass other --data") from error
    own = _of_split(name, split)
    if Path(name).is_dir() and not own and (other := [kind for kind in SPLITS if _of_split(name, kind)]):
        raise ValueError(
            f"{name} has files of {', '.join(other)} and none of {split}, which is needed: name them, or pass a file"
        )
    files = find_files(own or [name])
    if texts := [file.name for file in files if kind_of(file.name) == "text"]:
        raise ValueError(f'{texts[0]} is text, rows with "{COLUMN}" are needed: pass JSON Lines or Parquet')
    return files


def held_out_beside(name: str) -> list[File]:
    """The files called validation in a folder, or the one beside a file called train."""
    path = Path(name)
    if path.is_dir():
        return find_files(own) if (own := _of_split(name, "validation")) else []
    beside = path.with_name(path.name.replace("train", "validation", 1))
    return find_files([str(beside)]) if path.is_file() and beside != path and beside.is_file() else []


def _of_split(name: str, split: str) -> list[str]:
    """The files and folders of a split in a folder: train.jsonl and train-00001.parquet, not training.jsonl."""
    if not Path(name).is_dir():
        return []
    named = [path for path in sorted(Path(name).iterdir()) if re.match(rf"{re.escape(split)}(?![a-zA-Z])", path.name)]
    return [str(path) for path in named if path.is_dir() or kind_of(path.name)]


def read_conversations(files: Sequence[File], control: Collection[str], skip_bad: bool) -> Conversations:
    """The conversations of the files.

    A conversation may begin with a system message; then user and assistant take turns, and the assistant speaks at least once.
    Keys of a message but "role" and "content" are not read.

    Args:
        control: texts of the special tokens, one at least, which no message may hold: they would be read as the tokens.
        skip_bad: leave out and count what is no such conversation.

    Raises: ValueError if there is none, or naming file and line of the first bad rows, all together, unless they are skipped.
    """
    found, faults = Conversations(), []
    token = any_of(control)
    for file in files:
        for where, row, fault in _rows(file.name):
            fault = fault or fault_of(row, token)
            if fault is None:
                found.rows.append([{key: message[key] for key in ("role", "content")} for message in row[COLUMN]])
            else:
                found.left_out[_kind(fault)] += 1
                faults.append(f"{where} {fault}")
    names = ", ".join(file.name for file in files[:3])
    if faults and not skip_bad:
        listed = "\n".join(faults[:NAMED])
        more = f"\n... and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise ValueError(
            f"{len(faults)} rows of {names} are no conversations to train on, mend them, or pass --skip_bad_rows to leave"
            f" them out:\n{listed}{more}"
        )
    if not found.rows:
        raise ValueError(f"{names} has no conversation, one at least is needed: pass other --data")
    return found


def any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds any of these texts, of which there is one at least."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


def fault_of(row: Any, token: re.Pattern[str]) -> str | None:
    """What is wrong with a row, or None; the part before ":" is the kind of the fault."""
    messages = row.get(COLUMN) if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        return f"has no messages: {row!r:.60}"
    if strange := [message for message in messages if not isinstance(message, dict)]:
        return f"has a message that is no object: {strange[0]!r:.60}"
    roles = [message.get("role") for message in messages]
    for number, message in enumerate(messages, 1):
        fault = text_fault(message.get("content"), token)
        if message.get("role") not in ROLES:
            fault = f"has an unknown role: {message.get('role')!r:.40}, not one of {', '.join(ROLES)},"
        if fault:
            kind, _, about = fault.partition(": ")
            return f"{kind}: {about} in message {number}"
    turns = roles[1:] if roles[0] == "system" else roles
    if "system" in turns:
        return "has a system message that is not the first: it may only stand there"
    if twice := [before for before, after in itertools.pairwise(turns) if before == after]:
        return f"has two turns of one role in a row: {twice[0]}"
    if turns and turns[0] == "assistant":
        return "begins with a reply: a user must speak first"
    if "assistant" not in turns:
        return "has no reply: the assistant must speak"
    return None


def text_fault(content: Any, token: re.Pattern[str]) -> str | None:
    """What is wrong with what somebody says, or None."""
    if not isinstance(content, str):
        return f"has a content that is no string: {content!r:.40}"
    if not content.strip():
        return f"has an empty content: {content!r:.40}"
    if not content.isascii() and re.search("[\ud800-\udfff]", content):
        return "is not Unicode: a lone surrogate"
    if match := token.search(content):
        return f"has a special token in a text: {match[0]}"
    return None


def _kind(fault: str) -> str:
    return fault.partition(":")[0]


def _rows(name: str) -> Iterator[tuple[str, Any, str | None]]:
    """(where it stands, the row, None) for each row of a file, or (where, None, what is wrong there)."""
    if kind_of(name) == "parquet":
        yield from _parquet_rows(name)
        return
    for record in records(name, 0, None, COLUMN, "line"):
        row, fault = None, record.fault
        if fault is None:
            try:
                row = parse_json(record.content, "it", "mend the line")
            except ValueError as error:
                fault = f"is not JSON: {str(error).removeprefix('it is not JSON ')}"
        yield place(record, 0), row, fault


def _parquet_rows(name: str) -> Iterator[tuple[str, Any, str | None]]:
    number = 0
    try:
        with open_bytes(name) as stream:
            table = pq.ParquetFile(stream)
            if COLUMN not in table.schema_arrow.names:
                found = ", ".join(table.schema_arrow.names)
                raise ValueError(f"{name} has no column {COLUMN} (found: {found}): rename a column, or pass another file")
            for batch in table.iter_batches(batch_size=1024, columns=[COLUMN]):
                for messages in batch.column(0).to_pylist():
                    number += 1
                    yield f"{name} row {number}", {COLUMN: messages}, None
    except (pa.ArrowException, OSError) as error:
        if not is_damage(error):
            raise
        yield f"{name} row {number + 1}", None, f"is damaged: {error!s:.200}"
