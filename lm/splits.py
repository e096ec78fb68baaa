"""The held-out sets of the graph-search task: what build_data_splits.py made, opened after checking that it is whole.

eval.jsonl, test.jsonl, mixin.jsonl   rows {"input_text", "output_texts" (the drawn label first), "alpha", "stage", "seed", ...}
meta.json                             sizes of the task, generator, and of each file its count, size and SHA-256; in place last

No prompt stands in two of the sets, or twice in one.
"""

import importlib.util
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.checks import COUNT, FILE, file_faults, kind_faults, list_faults, refuse
from lm.files import read_jsonl, read_sealed, sha256
from lm.graph_search import Task
from lm.graph_text import fingerprint, prompt_digest

FORMAT = "splits-2"
MADE_BY = "build_data_splits.py"
SETS = ("eval", "test", "mixin")  # a prompt that two could hold is the earlier one's
BUILT_IN = "built-in"  # the name of our own generator
ROW = {"input_text": str, "output_texts": list, "alpha": float, "stage": int, "seed": int}
META = {"max_input_size": range(2**20), "max_lookahead": range(2**20), "generator": dict, "files": dict}
META |= {"reachable_lookahead": int, "mean_prompt_chars": float}


@dataclass(frozen=True)
class Splits:
    """Held-out sets that have been checked; `reserved` are the digests of all their prompts, which no training may use."""

    folder: Path
    meta: dict
    task: Task
    reserved: frozenset[bytes]

    def rows(self, name: str) -> list[dict]:
        """The rows of "eval", "test" or "mixin", in the order of the file; read anew, for mixin.jsonl is large."""
        return read_rows(self.folder, name, self.meta)


def splits_folder(scratch_dir: Path | str, task: Task, seed: int, generator: str | None = None) -> Path:
    """Where the held-out sets of these arguments lie; those of an external generator have its class in their name."""
    suffix = "" if generator is None else f"_{generator.rpartition(':')[2]}"
    name = f"mis{task.max_input_size}_look{task.max_lookahead}_seed{seed}{suffix}"
    return Path(scratch_dir) / "data/nl_splits" / name


def identify(generator: str | None) -> dict[str, str | None]:
    """Name and fingerprint of a generator: our own (None), or "module:Class" with the SHA-256 of its source (None: unknown)."""
    if generator is None:
        return {"name": BUILT_IN, "fingerprint": fingerprint()}
    try:
        source = importlib.util.find_spec(generator.partition(":")[0])
    except (ImportError, ValueError):  # a package of it is not there, or the name is empty
        source = None
    known = source is not None and source.origin is not None and source.origin.endswith(".py")
    return {"name": generator, "fingerprint": sha256(source.origin) if known else None}


def read_meta(folder: Path) -> dict[str, Any]:
    """What meta.json says. Raises: FileNotFoundError if there is none; ValueError if it is none of this format, or changed."""
    path = folder / "meta.json"
    meta = read_sealed(path, MADE_BY, FORMAT)
    refuse(kind_faults(path, meta, META), MADE_BY)
    faults = kind_faults(f"{path} generator", meta["generator"], {"name": str})
    faults += list_faults(path, meta["files"], [f"{name}.jsonl" for name in SETS], FILE | {"count": COUNT})
    faults += [f"{path}: {fault}" for fault in Task(meta["max_input_size"], meta["max_lookahead"]).faults()]
    refuse(faults, MADE_BY)
    return meta


def check_files(folder: Path, files: dict[str, dict]) -> None:
    """Raises: ValueError naming every file whose size, or if all sizes are right whose SHA-256, is not as `files` says."""
    refuse(file_faults(folder, files), MADE_BY)


def read_splits(
    folder: Path | str, max_input_size: int | None = None, max_lookahead: int | None = None, generator: str | None = None
) -> Splits:
    """Open held-out sets for a run that draws examples itself: as `open_splits` does, after checking that they are for it.

    Args:
        folder: what build_data_splits.py made.
        max_input_size, max_lookahead: the run's; None takes the data's.
        generator: the run's, "module:Class"; None is the built-in one.

    Raises: as `open_splits` does; ValueError too if the data is of another task or another generator than the run's.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    asked = {"max_input_size": max_input_size, "max_lookahead": max_lookahead}
    faults = [
        f"--{name} {value}, but {folder} was built with {meta[name]}: pass --{name} {meta[name]}, or other held-out sets"
        for name, value in asked.items()
        if value not in (None, meta[name])
    ]
    faults += _generator_faults(folder, meta["generator"], identify(generator))
    if faults:
        raise ValueError("\n".join(faults))
    return open_splits(folder)


def open_splits(folder: Path | str) -> Splits:
    """Open held-out sets after checking their files, their rows, and that no two of all the prompts are the same.

    Raises: FileNotFoundError if there is nothing, or nothing finished; ValueError, all faults of a kind together, if the data
        is damaged.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    check_files(folder, meta["files"])
    digests = {name: [prompt_digest(row["input_text"]) for row in read_rows(folder, name, meta)] for name in SETS}
    refuse((f"{folder}: {fault}" for fault in _repeats(digests)), MADE_BY)
    reserved = frozenset(itertools.chain.from_iterable(digests.values()))
    return Splits(folder, meta, Task(meta["max_input_size"], meta["max_lookahead"]), reserved)


def _generator_faults(folder: Path, there: dict, now: dict) -> list[str]:
    """Why sets of the generator `there` are none for a run of the generator `now`."""
    remedy = "the held-out sets would be of another distribution: pass the same --generator, or build the sets with it"
    if there["name"] != now["name"]:
        return [f"{folder} was built with generator {there['name']}, the run's is {now['name']}; {remedy}"]
    known = there.get("fingerprint"), now["fingerprint"]
    if None not in known and known[0] != known[1]:
        return [f"{folder} was built with generator {there['name']} of fingerprint {known[0]}, now it is {known[1]}; {remedy}"]
    return []


def read_rows(folder: Path, name: str, meta: dict[str, Any]) -> list[dict]:
    """Raises: ValueError naming file and line of a row that lacks something, or the file if it has not as many as it should."""
    path, count = folder / f"{name}.jsonl", meta["files"][f"{name}.jsonl"]["count"]
    rows = read_jsonl(path, MADE_BY)
    for line, row in enumerate(rows, 1):
        if [type(row.get(key)) for key in ROW] != list(ROW.values()):
            refuse(kind_faults(f"{path} line {line}", row, ROW), MADE_BY)
        if not row["output_texts"] or not all(isinstance(text, str) for text in row["output_texts"]):
            fault = f"{path} line {line} has output_texts {row['output_texts']!r:.80}, one string or more are needed"
            refuse([fault], MADE_BY)
    if len(rows) != count:
        refuse([f"{path} has {len(rows)} rows, {count} are needed"], MADE_BY)
    return rows


def _repeats(digests: dict[str, list[bytes]]) -> list[str]:
    """A line for each set that holds a prompt twice, and for each two sets that share one."""
    faults, line_of = [], {}
    for name, found in digests.items():
        line_of[name] = {digest: line for line, digest in reversed(list(enumerate(found, 1)))}  # the first line of each
        if again := [(line_of[name][digest], line) for line, digest in enumerate(found, 1) if line_of[name][digest] != line]:
            faults.append(f"{name}.jsonl repeats {len(again)} prompts (first: lines {again[0][0]} and {again[0][1]})")
    for one, other in itertools.combinations(line_of, 2):
        if shared := line_of[one].keys() & line_of[other].keys():
            first = min(shared, key=line_of[one].get)
            lines = f"{one} line {line_of[one][first]}, {other} line {line_of[other][first]}"
            faults.append(f"{one}.jsonl and {other}.jsonl share {len(shared)} prompts (first: {lines})")
    return faults
