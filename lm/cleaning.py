"""What a cleaning job is, and what is done to each document: it is normalised, judged and signed.

lm/cleaning_stages.py has the stages that a job goes through.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from lm.contamination import Evaluation
from lm.documents import EMPTY, Piece, Reading, documents, where
from lm.files import read_sealed
from lm.language import languages
from lm.minhash import MinHash
from lm.quality import c4, gopher
from lm.text_normal import normalise

MADE_BY = "clean_corpus.py"
EXCERPT = 200  # characters of an example
Tell = Callable[[int], None]  # is told how many more documents were read


@dataclass(frozen=True)
class Steps:
    """What is done to each document, in this order; empty, 0 or False for what is not."""

    unicode: bool = True
    language: str = "en"
    language_threshold: float = 0.65
    gopher: bool = True
    c4: bool = False
    exact: bool = True
    bands: int = 14
    rows_per_band: int = 8
    shingle_words: int = 5


@dataclass(frozen=True)
class Job:
    """All that a task needs to know."""

    folder: Path  # OUTPUT_DIR
    pieces: list[Piece]
    reading: Reading
    steps: Steps
    evaluation: Evaluation
    compression: str  # zst or gz
    examples: int  # of each reason
    memory: int  # bytes, of a task of `duplicates`
    skip_bad_documents: bool

    def place(self, stage: str, number: int = 0) -> Path:
        """What a task writes, a folder or a file."""
        return self.folder / "partial" / stage / f"{number:05d}"

    def report(self, stage: str, number: int = 0) -> dict[str, Any]:
        """What a finished task of filter, plan or write says."""
        return read_sealed(self.place(stage, number) / "report.json", MADE_BY)

    def part(self, number: int) -> Path:
        return self.folder / f"part_{number:05d}.jsonl.{self.compression}"


@dataclass
class Tally:
    """Documents and characters by what became of them, and the first few examples of each reason."""

    most: int
    counts: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def count(self, what: str, characters: int) -> None:
        found = self.counts.setdefault(what, [0, 0])
        found[0] += 1
        found[1] += characters

    def wants(self, reason: str) -> bool:
        """Whether one more example of the reason is shown."""
        return len(self.examples.get(reason, ())) < self.most

    def remove(self, reason: str, text: str, example: dict[str, Any]) -> None:
        """Count a document that goes, and keep the example, if one more is shown."""
        self.count(reason, len(text))
        if self.wants(reason):
            self.examples.setdefault(reason, []).append({**example, "excerpt": text[:EXCERPT]})


def judge(text: str, steps: Steps) -> tuple[str, str | None, dict[str, Any]]:
    """A document as it goes on, the reason why it does not, and what an example of that says."""
    if steps.unicode:
        text = normalise(text)
        if not text.strip():
            return text, EMPTY, {}
    if steps.language:
        language, probability = languages().detect(text)
        if language != steps.language or probability < steps.language_threshold:
            return text, "language", {"language": language, "probability": round(probability, 3)}
    if steps.c4:
        lines, broken = c4(text)
        if broken:
            return text, f"c4: {broken[0]}", {"value": round(broken[1], 3)}
        text = lines
    if steps.gopher and (broken := gopher(text)):
        return text, f"gopher: {broken[0]}", {"value": round(broken[1], 3)}
    return text, None, {}


def exact_key(text: str) -> int:
    """A hash of a text whatever its spaces; two of a billion different texts are equal in it once in 37 corpora."""
    return int.from_bytes(blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class Signer:
    """The keys of a document: of the whole text, and of the bands."""

    def __init__(self, steps: Steps):
        self.exact = steps.exact
        self.minhash = MinHash(steps.bands, steps.rows_per_band, steps.shingle_words) if steps.bands else None
        self.columns = int(self.exact) + steps.bands

    def keys(self, text: str) -> np.ndarray:
        whole = exact_key(text)
        exact = np.array([whole] if self.exact else [], np.uint64)
        if self.minhash is None:
            return exact
        bands = self.minhash.keys(text)
        # A text without words resembles none but itself.
        return np.append(exact, np.full(self.minhash.num_bands, whole, np.uint64) if bands is None else bands)


def kept(job: Job, number: int, tally: Tally, tell: Tell) -> Iterator[tuple[str, int, str]]:
    """File, line within the piece, and text of each document that is not left out."""
    piece = job.pieces[number]
    for document in documents(piece, number, job.reading):
        tell(1)
        if document.text is None and document.fault != EMPTY and not job.skip_bad_documents:
            raise ValueError(
                f"{where(piece, document)} is no document: {document.fault}; mend it, or pass --skip_bad_documents to leave"
                " out all such and count them"
            )
        text, reason, facts = document.text or "", document.fault, {}
        tally.count("read", len(text))
        if reason is None:
            text, reason, facts = judge(text, job.steps)
        elif reason != EMPTY:
            reason, facts = "no document", {"fault": reason}
        file, line = document.record.file, document.record.number
        if reason is None:
            if text != document.text:
                tally.count("changed", len(text))
            yield file, line, text
        else:
            tally.remove(reason, text, {"file": file, "line": line, **facts})
