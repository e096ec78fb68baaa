"""Finding rows of evaluation sets in documents, by runs of words that both have.

As GPT-3 was decontaminated (Brown et al., arXiv 2005.14165, appendix C): a document goes if it has 13 words in a row, in lower
case and without punctuation, that a row has too. Of a text of 8 to 12 words, all of them in a row are looked for; a shorter one
is too common to be looked for (8 is the least that GPT-3 used). The texts of a row are all strings in it, and each choice after
its question as lm-eval words them; so that no text of a question is missed because it stands in another order elsewhere.
"""

import difflib
import hashlib
import itertools
import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.corpus import File, digest
from lm.document_kernels import code_points, find_gram, grams, kinds, put_first, split_words
from lm.documents import Reading, cut, documents, where
from lm.files import read_jsonl, sha256, whole_folder, write_json
from lm.text_normal import normalise

GRAM, LEAST = 13, 8  # words
# Tasks whose rows are read as they are, their dataset on the hub: name, configuration, split.
PLAIN = {
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
    "wikitext": ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
}
OTHER_NAMES = {"lambada": "lambada_openai"}
MADE_BY = "fetch_samples.py --parts tasks"


@dataclass(frozen=True)
class Evaluation:
    """What must not be in the corpus."""

    tasks: tuple[str, ...] = ()
    rows: Path | None = None  # folder of the rows of tasks; None: the hub
    files: tuple[File, ...] = ()
    text_column: str = "text"

    @property
    def sources(self) -> list[str]:
        return [*self.tasks, *(file.name for file in self.files)]

    def identity(self) -> dict[str, Any]:
        """What another run with the same evaluation sets has too."""
        rows = {task: [sha256(path) for path in self._paths(task)] for task in self.tasks} if self.rows else "hub"
        content = hashlib.sha256(json.dumps([rows, digest(self.files)]).encode()).hexdigest()
        return {"tasks": list(self.tasks), "files": len(self.files), "sha256": content}

    def faults(self) -> list[str]:
        """Each name that is no task, and each task whose rows are not there. Imports lm-eval, which takes seconds."""
        from lm.tasks import TASKS

        found = []
        for name in self.tasks:
            known = [*TASKS, *(plain for plain in PLAIN if plain not in TASKS)]
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
                meant = f" (did you mean {' or '.join(near)}?)" if near else ""
                found.append(f"--eval_decontaminate {name!r} is no task{meant}: choose from {','.join(known)}")
            elif self.rows and not self._paths(name):
                remedy = f"put its rows there as JSON Lines ({PLAIN[name][0]})" if name in PLAIN else f"run {MADE_BY}"
                found.append(f"no {self.rows / name}/*.jsonl: {remedy}, or leave out --rows to fetch all tasks from the hub")
        return found

    def _paths(self, task: str) -> list[Path]:
        return sorted((self.rows / task).rglob("*.jsonl"))

    def texts(self, source: int) -> Iterator[set[str]]:
        """The texts of each row of a source, in order. Raises: ValueError for a row or document that is none."""
        if source >= len(self.tasks):
            return self._documents(self.files[source - len(self.tasks)])
        name = self.tasks[source]
        return map(_strings, self._plain_rows(name)) if name in PLAIN else self._worded(name)

    def _plain_rows(self, name: str) -> Iterable[dict]:
        if self.rows is not None:
            return itertools.chain.from_iterable(read_jsonl(path, MADE_BY) for path in self._paths(name))
        import datasets

        path, config, split = PLAIN[name]
        return datasets.load_dataset(path, config, split=split)

    def _worded(self, name: str) -> Iterator[set[str]]:
        from lm.scorer import quiet
        from lm.tasks import load_task, parts_of

        for part in parts_of([name]):
            with quiet():
                task = load_task(part, self.rows)
                rows = task.eval_docs
            for row in rows:
                yield _strings(row) | worded(task, row)

    def _documents(self, file: File) -> Iterator[set[str]]:
        reading = Reading(self.text_column, text_unit="line", shuffle_window=0)  # questions stand a line each
        for number, piece in enumerate(cut([file], reading)):
            for document in documents(piece, number, reading):
                if document.text is None and document.fault != "empty":
                    raise ValueError(f"{where(piece, document)} is no document: {document.fault}; mend --eval_documents")
                yield {document.text or ""}


def _strings(value: Any) -> set[str]:
    """All strings in a value, however deep."""
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return set().union(*map(_strings, inner))


def worded(task: Any, row: dict) -> set[str]:
    """Each choice with its question, as lm-eval's task has it in a prompt; nothing for a task without choices."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return set()
    choices, delimiter = task.doc_to_choice(row), task.config.target_delimiter
    if task.multiple_input:  # the choices are beginnings, and what follows is the same for all
        return {f"{choice}{delimiter}{task.doc_to_target(row)}" for choice in choices}
    return {f"{task.doc_to_text(row)}{delimiter}{choice}" for choice in choices}


def gram_lengths(num_words: int) -> int:
    """How many words in a row of a text of so many are looked for; 0 for none."""
    return min(num_words, GRAM) if num_words >= LEAST else 0


def write_index(evaluation: Evaluation, folder: Path) -> None:
    """Write all runs of words that are looked for: a table (lm/document_kernels.py) from their hashes to 1 + the row."""
    keys, values, lengths, sources, num_rows = [], [], set(), [], 0
    for source, name in enumerate(evaluation.sources):
        first, too_short = num_rows, 0
        for texts in evaluation.texts(source):
            num_rows += 1
            found = []
            for text in sorted({*texts, *map(normalise, texts)}):  # as documents are that are normalised, and as they are
                words = split_words(code_points(text.lower()), kinds())[0]
                if length := gram_lengths(len(words)):
                    found.append(grams(words, length))
                    lengths.add(length)
            too_short += not found
            row = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)
            keys.append(row)
            values.append(np.full(len(row), num_rows, np.uint64))
        sources.append({"name": name, "first": first, "rows": num_rows - first, "too_short": too_short})
        if num_rows == first:
            raise ValueError(f"{name} has no row, one at least is needed: mend it, or leave it out of the evaluation sets")
    keys, values = (np.concatenate(arrays) if arrays else np.empty(0, np.uint64) for arrays in (keys, values))
    table = np.zeros((2, 2 * len(keys) + 1), np.uint64)
    put_first(*table, keys, values)
    with whole_folder(folder) as partial:
        np.save(partial / "table.npy", table)
        write_json(partial / "index.json", {"sources": sources, "lengths": sorted(lengths)})


class Index:
    """What `write_index` wrote, the table shared by all processes that read it."""

    def __init__(self, folder: Path):
        known = json.loads((folder / "index.json").read_text())
        self.sources, self.lengths = known["sources"], np.array(known["lengths"], np.int64)
        self.table = np.load(folder / "table.npy", mmap_mode="r")

    def find(self, text: str) -> dict[str, Any] | None:
        """The first words of a text that are looked for, and of which row of what they are the first; None if it has none."""
        if not len(self.lengths):
            return None
        words, spans = split_words(code_points(text.lower()), kinds())
        at, length, value = find_gram(words, self.lengths, *self.table)
        if at < 0:
            return None
        source = self.sources[bisect_right([source["first"] for source in self.sources], value - 1) - 1]
        begin, end = spans[at, 0], spans[at + length - 1, 1]
        return {"in": source["name"], "row": int(value) - 1 - source["first"], "words": text.lower()[begin:end]}


def chosen_tasks(names: str) -> tuple[str, ...]:
    """The tasks of a list with commas, each once."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    return tuple(dict.fromkeys(OTHER_NAMES.get(name, name) for name in found))
