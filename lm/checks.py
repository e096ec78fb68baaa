"""Whether what a file says of itself is so: kinds and ranges of its values, and the names, sizes and checksums of its files."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from lm.files import outside, sha256

COUNT = range(2**48)  # of tokens, bytes, rows: what is more is damaged, and less than this can be added up and multiplied
FILE = {"size": COUNT, "sha256": str}

# Types, ranges of integers, and annotations as list[bool] or int | None, in which an int is a count.
Kinds = Mapping[str, Any]


def refuse(faults: Iterable[str], made_by: str) -> None:
    """Raises: ValueError with a line for each of the faults of a folder, if there are any."""
    if lines := [f"{fault}: remove the folder and run {made_by} again" for fault in faults]:
        raise ValueError("\n".join(lines))


def kind_faults(where: object, found: Any, kinds: Kinds) -> list[str]:
    """A line for each key of `kinds` that the object `found` has not, or not of that kind or in that range."""
    if not isinstance(found, dict):
        return [f"{where} is {found!r:.80}, an object is needed"]
    return [
        f"{where} has {key} {found.get(key)!r:.80}, {_needed(found.get(key), kind)} is needed"
        for key, kind in kinds.items()
        if key not in found or not _fits(found[key], kind)
    ]


def _needed(value: Any, kind: Any) -> str:
    """What is needed instead of a value that is not of the kind."""
    if isinstance(kind, range):
        return f"{kind.start} to {kind.stop - 1}" if type(value) is int else "int"
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, range):
        return type(value) is int and value in kind  # type, as isinstance takes True for 1
    if kind is float:
        return type(value) is float or (type(value) is int and abs(value) < 2**63)
    if isinstance(kind, type):
        return type(value) is kind
    origin, inner = get_origin(kind), [COUNT if one is int else one for one in get_args(kind)]
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    items = value.values() if type(value) is dict else value
    return type(value) is origin and all(_fits(item, inner[-1]) for item in items)


def count_faults(where: object, found: dict[str, Any]) -> list[str]:
    """A line for each value of an object that is no count."""
    return kind_faults(where, found, dict.fromkeys(found, COUNT))


def list_faults(where: object, files: dict[str, Any], needed: Collection[str] = (), kinds: Kinds = FILE) -> list[str]:
    """What is wrong with a list of files, {name: {"size", "sha256"}}, before any of them is looked at."""
    faults = [f"{where} names {name!r:.80}, a file inside the folder is needed" for name in outside(files)]
    faults += [f"{where} does not list {name}" for name in needed if name not in files]
    for name, facts in files.items():
        faults += kind_faults(f"{where} {name:.80}", facts, kinds)
    return faults


def size_fault(folder: Path, name: str, size: int) -> str | None:
    """What is wrong with a file whose bytes are not looked at."""
    path = folder / name
    if not path.is_file():
        return f"{path} is missing, {size} bytes are needed"
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{path} is a link to {path.resolve()}, a file inside the folder is needed"
    found = path.stat().st_size
    return None if found == size else f"{path} has {found} bytes, {size} bytes are needed"


def file_faults(folder: Path, files: dict[str, dict[str, Any]], unread: Collection[str] = ()) -> list[str]:
    """A line for each file whose size, or if all sizes are right whose SHA-256 (but of those `unread`), is not as listed."""
    if faults := [fault for name, facts in files.items() if (fault := size_fault(folder, name, facts["size"]))]:
        return faults
    found = {name: sha256(folder / name) for name in files if name not in unread}
    return [
        f"{folder / name} has SHA-256 {digest}, {files[name]['sha256']:.80} is needed"
        for name, digest in found.items()
        if digest != files[name]["sha256"]
    ]
