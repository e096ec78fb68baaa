"""Writing a paper store (`lm.papers` says what is in it) so that a run killed at any instant continues where it was.

Until it is finished the store lives in its folder's `partial/`, where `progress.json` says how much of it is safe on the
disk. The finished files are moved out of there, meta.json last.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lm.checks import COUNT, count_faults, kind_faults, refuse
from lm.files import listed, read_jsonl, read_sealed, sync, write_json, write_sealed
from lm.papers import DTYPES, FORMAT, HEADER, MADE_BY, read_meta

PROGRESS = HEADER | {"rows": dict, "tokens": COUNT, "index_bytes": COUNT, "left_out": dict}


def stored(folder: Path | str) -> tuple[dict | None, bool]:
    """(meta, True) of a finished store, (progress, False) of an unfinished one, (None, False) if there is none."""
    folder = Path(folder)
    if (folder / "meta.json").exists():
        shutil.rmtree(folder / "partial", ignore_errors=True)  # killed just after the last file was moved out
        return read_meta(folder), True
    progress = folder / "partial" / "progress.json"
    return (_read_progress(progress), False) if progress.exists() else (None, False)


def _read_progress(path: Path) -> dict[str, Any]:
    """The header of a store and how far it is. Raises: ValueError if that is not what was written."""
    state = read_sealed(path, MADE_BY, FORMAT)
    refuse(kind_faults(path, state, PROGRESS), MADE_BY)
    refuse([*count_faults(f"{path} rows", state["rows"]), *count_faults(f"{path} left_out", state["left_out"])], MADE_BY)
    return state


def differences(there: Any, asked: Any, name: str = "") -> list[str]:
    """One line for each value of `asked` that `there` holds differently; what only `there` holds is not compared."""
    if isinstance(there, dict) and isinstance(asked, dict):
        return [line for key in asked for line in differences(there.get(key), asked[key], f"{name}.{key}".lstrip("."))]
    return [] if there == asked else [f"{name}: there {there!r:.100}, asked {asked!r:.100}"]


def refuse_other(there: dict, asked: dict, folder: Path) -> None:
    """Raises: ValueError naming every difference if `folder` holds, finished or not, something else than `asked`."""
    if different := differences(there, asked):
        raise ValueError(
            f"{folder} holds other data ({'; '.join(different)}): pass another --output_dir, or remove this folder"
        )


def move_into_place(complete: Path, folder: Path) -> dict:
    """Move a store that is complete in or below `folder/partial` up to `folder`, meta.json last; return the meta."""
    meta = read_meta(complete)
    for name in [*meta["files"], "meta.json"]:
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if (complete / name).exists():  # else moved before a kill
            os.replace(complete / name, target)
            sync(target.parent)
    shutil.rmtree(folder / "partial")
    return meta


class PaperWriter:
    """Writes a store row by row so that a run killed at any instant continues and ends with the same bytes.

    Args:
        folder: where the finished store will be.
        header: dtype, vocab_size, tokenizer {name, fingerprint}, source; kept in meta.json.
        splits: names of the splits, in the order in which they are written.

    `rows[split]` is the number of source rows already dealt with: the next one to give to `add` or `leave_out`.

    Raises: ValueError if the folder holds other or damaged data; RuntimeError if another process is writing it.
    """

    def __init__(self, folder: Path | str, header: dict, splits: Iterable[str]):
        self.folder = Path(folder)
        self.partial = self.folder / "partial"
        self.header = {"format": FORMAT, **header}
        self.dtype = DTYPES[header["dtype"]]
        if (self.folder / "meta.json").exists():
            raise ValueError(f"{self.folder} is finished, an unfinished one is needed: pass another --output_dir")
        strangers = [name for name in ("tokens.bin", "index.jsonl") if (self.folder / name).exists()]
        if strangers and not self.partial.exists():
            raise ValueError(
                f"{self.folder} holds {', '.join(strangers)} without meta.json or partial/, so of unknown origin: "
                "pass another --output_dir, or remove this folder"
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.partial / "lock", "w")  # noqa: SIM115 (the system frees it when the process dies)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing {self.folder}: wait for it, or stop it") from None
        try:
            self._open({name: 0 for name in splits})
        except ValueError:
            self._lock.close()
            raise

    def _open(self, rows: dict[str, int]) -> None:
        """Take up the saved progress, or start; what was written after the last commit is cut off."""
        saved = self.partial / "progress.json"
        new = {**self.header, "rows": rows, "tokens": 0, "index_bytes": 0, "left_out": {}}
        state = _read_progress(saved) if saved.exists() else new
        refuse_other(state, self.header, self.folder)
        if state["rows"].keys() != rows.keys():
            refuse([f"{saved} has splits {', '.join(state['rows'])}, {', '.join(rows)} are needed"], MADE_BY)
        self.rows, self.num_tokens, self.left_out = state["rows"], state["tokens"], Counter(state["left_out"])
        self._tokens = self._index = None
        if (self.partial / "meta.json").exists():  # complete: killed while the files were moved into place
            return
        sizes = {"tokens.bin": self.num_tokens * self.dtype.itemsize, "index.jsonl": state["index_bytes"]}
        for name, size in sizes.items():
            with open(self.partial / name, "ab") as file:
                if file.tell() < size:
                    raise ValueError(f"{file.name} has {file.tell()} bytes, {size} were saved: remove {self.folder}")
                file.truncate(size)
        self._tokens = open(self.partial / "tokens.bin", "ab")  # noqa: SIM115
        self._index = open(self.partial / "index.jsonl", "ab")  # noqa: SIM115

    def add(self, split: str, category: str, ids: np.ndarray) -> None:
        """Append the split's next source row as a paper of at least one token."""
        assert len(ids), "a paper without tokens is left out, not added"
        assert ids.max() < self.header["vocab_size"], "ids must lie in the vocabulary"
        paper_id = f"{split}_{self.rows[split]}"
        row = {"paper_id": paper_id, "category": category, "offset": self.num_tokens, "length": len(ids)}
        self._tokens.write(np.ascontiguousarray(ids, self.dtype).data)
        self._index.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.num_tokens += len(ids)
        self.rows[split] += 1

    def leave_out(self, split: str, reason: str) -> None:
        """Count the split's next source row as left out."""
        self.left_out[reason] += 1
        self.rows[split] += 1

    def commit(self) -> None:
        """Make everything so far safe on the disk: a killed run continues from here."""
        for file in (self._tokens, self._index):
            file.flush()
            os.fsync(file.fileno())
        state = {**self.header, "rows": self.rows, "tokens": self.num_tokens}
        state |= {"index_bytes": self._index.tell(), "left_out": self.left_out}
        write_sealed(self.partial / "progress.json", state)

    def finish(self, tokenizer) -> dict:
        """Write splits, tokenizer and meta.json, move all into place, meta.json last, and return the meta.

        Raises: ValueError if a split has no paper.
        """
        if not (self.partial / "meta.json").exists():
            self.commit()
            self._seal(tokenizer)
        meta = move_into_place(self.partial, self.folder)
        self.close()
        return meta

    def close(self) -> None:
        """Let go of the files and of the folder; what was not committed is written again by the next run."""
        for file in (self._tokens, self._index, self._lock):
            if file:
                file.close()

    def _seal(self, tokenizer) -> None:
        """Write in `partial/` all that a finished store has."""
        splits: dict[str, list[str]] = {name: [] for name in self.rows}
        papers, tokens = Counter(), Counter()
        for row in read_jsonl(self.partial / "index.jsonl", MADE_BY):
            splits[row["paper_id"].rpartition("_")[0]].append(row["paper_id"])
            papers[row["category"]] += 1
            tokens[row["category"]] += row["length"]
        if empty := [name for name, ids in splits.items() if not ids]:
            raise ValueError(f"no paper in {', '.join(empty)} (left out: {dict(self.left_out)}), one is needed in each split")
        write_json(self.partial / "splits.json", splits)
        from lm.tokenizer import save_tokenizer  # transformers takes seconds to load, and is loaded by now

        save_tokenizer(tokenizer, self.partial / "tokenizer")
        files = [self.partial / name for name in ("tokens.bin", "index.jsonl", "splits.json")]
        files += sorted(path for path in (self.partial / "tokenizer").rglob("*") if path.is_file())
        for path in files:
            sync(path)
        counts = {name: {"papers": papers[name], "tokens": tokens[name]} for name in sorted(papers)}
        meta = {**self.header, "num_tokens": self.num_tokens, "num_papers": sum(papers.values()), "categories": counts}
        meta |= {"left_out": dict(sorted(self.left_out.items())), "files": listed(self.partial, files)}
        write_sealed(self.partial / "meta.json", meta)
