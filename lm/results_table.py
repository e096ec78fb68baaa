"""Rows of a published table of results in Parquet, CSV or JSON Lines, without evaluating anything that is written in them.

The format is that of allenai/DataDecide-eval-results: a row is one task of one checkpoint of one model, and its `metrics` are a
dict as text: as Python prints it (files train-*) or as JSON (macro_avg).
"""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from lm.args import check
from lm.comparable import Result, Run, Steps, compared_steps
from lm.files import parse_json

SUFFIXES = (".parquet", ".csv", ".jsonl")
PROXIES = ("primary_metric", "acc", "correct_prob", "margin", "norm_correct_prob", "total_prob")
"""How the names of measures begin; the table holds others too (predicted_index_raw, ...)."""
KEY = ("data", "params", "seed", "step")
MAX_FAULTS = 10
ROWS_AT_ONCE = 4096  # of Parquet: a row's metrics take about 1.5 kB
NOT_LITERAL = re.compile(r"(?<=[\[ ])-?(?:nan|inf)(?=[,\]}])")  # Python prints a NaN as a name, which is no literal


class Row(NamedTuple):
    """One row of a table."""

    file: Path
    number: int
    """From 1; in a CSV the heading is no row, in JSON Lines it is the line."""
    values: dict[str, Any]


def read_table(path: Path, step: Steps, say: Callable[[str], None]) -> list[Result]:
    """The results of a table that can be compared; the file is read twice, as its metrics are parsed only in rows that count.

    Raises: FileNotFoundError if there is no table; ValueError naming the file, and row, that cannot be read.
    """
    files = table_files(path)
    faults: list[str] = []
    cells = {_cell(row, faults) for file in files for row in table_rows(file, KEY)}
    check(faults)
    chosen = compared_steps(cells - {None}, step, say)
    results: dict[tuple[Run, str], Result] = {}
    for row in (row for file in files for row in table_rows(file, (*KEY, "task", "tokens", "compute", "metrics"))):
        run, at = _cell(row, faults)
        if chosen.get(run) != at:
            continue
        result = _result(row, run, at, faults)
        if result and (run, result.task) in results:
            _fault(faults, row, f"is {result.task} of {', '.join(run)} at step {at} once more")
        elif result:
            results[run, result.task] = result
    check(faults)
    return list(results.values())


def _cell(row: Row, faults: list[str]) -> tuple[Run, int] | None:
    """The run and step of a row; None, and a fault, if it does not say them."""
    recipe, size, seed, step = (row.values[name] for name in KEY)
    try:
        at = float(step)
        if recipe and size and seed not in (None, "") and at == int(at) >= 0:
            return Run(str(recipe), str(size), str(seed)), int(at)
    except (TypeError, ValueError, OverflowError):
        pass
    _fault(
        faults, row, f"has data, params, seed, step {(recipe, size, seed, step)!r:.120}, three names and a number are needed"
    )
    return None


def _result(row: Row, run: Run, step: int, faults: list[str]) -> Result | None:
    values = row.values
    try:
        if not values["task"]:
            raise ValueError(f"task {values['task']!r}, a name is needed")
        measures = {name: value for name, value in parse_metrics(values["metrics"]).items() if name.startswith(PROXIES)}
        amounts = {"tokens": float(values["tokens"]), "compute": float(values["compute"])}
    except (TypeError, ValueError) as error:
        _fault(faults, row, f"has {error}")
        return None
    return Result(**run._asdict(), step=step, task=str(values["task"]), measures=measures, **amounts)


def _fault(faults: list[str], row: Row, what: str) -> None:
    if len(faults) < MAX_FAULTS:
        faults.append(f"{row.file} row {row.number} {what}: mend or remove that row")


def table_files(path: Path) -> list[Path]:
    """The file, or in order of their names all tables in the folder.

    Raises: FileNotFoundError if there is none; ValueError if the file is of another kind.
    """
    if path.is_file() and path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}, one of {', '.join(SUFFIXES)} is needed: pass another file")
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.suffix in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no table ({', '.join(SUFFIXES)}) at {path}: pass a file, or the folder of its parts")
    return files


def table_rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows with these columns alone, in bounded memory; values of a CSV are text.

    Raises: ValueError naming the file if it cannot be read, or has not all of the columns.
    """
    read = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}[file.suffix]
    number = 0
    try:
        for number, values in read(file, columns):
            yield Row(file, number, values)
    except (pa.ArrowException, OSError, KeyError) as error:
        needed = f"a table with the columns {', '.join(columns)} is needed"
        raise ValueError(f"{file} after row {number} cannot be read ({error}), {needed}: fetch or mend it") from None


def _parquet(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with pa.parquet.ParquetFile(file) as table:
        _check_columns(table.schema_arrow.names, columns)
        yield from _numbered(table.iter_batches(ROWS_AT_ONCE, columns=list(columns)))


def _csv(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    convert = pa.csv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()))
    with pa.csv.open_csv(file, convert_options=convert) as batches:
        yield from _numbered(batches)


def _jsonl(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            row = parse_json(line, f"{file} line {number}", "mend or remove that line")
            _check_columns(row if isinstance(row, dict) else (), columns)
            yield number, {name: row[name] for name in columns}


def _check_columns(found: Any, needed: Sequence[str]) -> None:
    if missing := [name for name in needed if name not in found]:
        raise KeyError(f"no column {', '.join(missing)}")


def _numbered(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        columns = [column.to_pylist() for column in batch.columns]
        for values in zip(*columns, strict=True):
            number += 1
            yield number, dict(zip(batch.schema.names, values, strict=True))


def parse_metrics(text: Any) -> dict[str, float]:
    """The finite numbers of a dict that is written as JSON or as Python prints it; all other values are left out.

    Raises: ValueError if it is neither.
    """
    metrics = text
    if isinstance(text, str):
        try:
            metrics = json.loads(text)
        except ValueError:
            try:
                metrics = ast.literal_eval(NOT_LITERAL.sub("None", text))
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                metrics = None
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics {text!r:.60}, a dict of measures is needed")
    return {name: float(value) for name, value in metrics.items() if type(value) in (int, float) and math.isfinite(value)}
