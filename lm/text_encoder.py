"""Texts to token ids at the speed of the machine: by a faster encoder that gives Hugging Face's ids, else by Hugging Face's.

Hugging Face's ids are the truth. gigatoken (github.com/marcelroed/gigatoken) is tens of times faster and young, and characters
are looked up in a table, so documents are encoded by both and compared: a sample of them, or all. No transformers here: worker
processes import this.
"""

import importlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lm.characters import CharacterTable, simplify

MOST_GROWTH = 2**29  # bytes of a process, after which gigatoken is loaded anew

# Whatever a tokenizer does to a text, one of these shows it.
TRIED = (
    "The quick Brown fox, 12345 jumps!",
    "don't   stop\n\n\tnow ",
    " naïve café — “x²” 中文 🙂",
    "it's 3.14 e-mails<|endoftext|>",
)


@dataclass(frozen=True)
class Encoded:
    """Ids of some texts, one after another: text i has `ids[ends[i - 1]:ends[i]]`."""

    ids: np.ndarray  # (tokens,) uint32
    ends: np.ndarray  # (texts,) int64
    num_compared: int  # texts encoded by both
    differing: list[int]  # of these, the ones where the two differ; their ids are Hugging Face's


class TextEncoder:
    """Encodes texts as plain text: nothing is added, and a control token written in a text is only its characters.

    Args:
        tokenizer_json: what tokenizer.json holds.

    `name` says which encoder does the work, and `why_not_fast` why it is Hugging Face's.
    """

    def __init__(self, tokenizer_json: str):
        self._reference = Tokenizer.from_str(tokenizer_json)
        self._reference.encode_special_tokens = True
        self._reference.no_truncation()
        self._reference.no_padding()
        self._fast, self.why_not_fast = _load_fast(tokenizer_json)
        tried = [simplify(text) for text in TRIED] if isinstance(self._fast, CharacterTable) else TRIED
        if self._fast is not None and (differing := self.encode(tried, range(len(tried))).differing):
            self._fast, self.why_not_fast = None, f"{self._fast.name} encodes {tried[differing[0]]!r} differently"
        self.name = f"tokenizers {version('tokenizers')}" if self._fast is None else self._fast.name

    def encode(self, texts: Sequence[str], compare: Sequence[int] = ()) -> Encoded:
        """The ids of the texts, those whose indices are in `compare` encoded by both encoders."""
        if self._fast is None:
            ids = self._exact(texts)
            return _joined(ids, len(texts), [])
        flat, ends = self._fast.encode(texts)
        exact = dict(zip(compare, self._exact([texts[i] for i in compare]), strict=True))
        differing = [i for i, ids in exact.items() if not np.array_equal(ids, _part(flat, ends, i))]
        if not differing:
            return Encoded(flat, ends, len(exact), [])
        return _joined([exact.get(i, _part(flat, ends, i)) for i in range(len(texts))], len(exact), differing)

    def _exact(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._reference.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]


class _Gigatoken:
    """gigatoken's tokenizer, one text after another.

    It keeps every word that it has met (some 90 bytes each), so it is loaded anew, in a second, when memory has grown much.
    """

    def __init__(self, rules: str):
        self.name, self._rules = f"gigatoken {version('gigatoken')}", rules
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._tokenizer: Any = None  # free the one before first
        self._tokenizer = gigatoken.Tokenizer.from_json(self._rules)
        self._resident = resident_bytes()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts (uint32), and where each text's end (int64)."""
        import awkward as ak  # gigatoken brings it

        found = self._tokenizer.encode_batch(list(texts), parallel=False)
        ends = np.cumsum(ak.to_numpy(ak.num(found)), dtype=np.int64)
        ids = np.asarray(ak.to_numpy(ak.flatten(found)), np.uint32)
        if resident_bytes() - self._resident > MOST_GROWTH:
            self._load()
        return ids, ends


def resident_bytes() -> int:
    """Memory that this process has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _load_fast(tokenizer_json: str) -> tuple[CharacterTable | _Gigatoken | None, str | None]:
    """The faster encoder, or None and the reason; a tokenizer that gigatoken takes for another is found out at once."""
    if CharacterTable.is_for(tokenizer_json):
        return CharacterTable(), None
    try:
        importlib.import_module("gigatoken")
    except ImportError as error:
        return None, f"gigatoken is not installed ({error})"
    rules = json.loads(tokenizer_json)
    # Without their entries, special tokens are plain text to it, as `encode_special_tokens` makes them to Hugging Face's.
    rules["added_tokens"] = [token for token in rules.get("added_tokens") or [] if not token["special"]]
    rules["post_processor"] = None
    try:
        return _Gigatoken(json.dumps(rules)), None
    except Exception as error:  # whatever a Rust library raises for what it does not know
        return None, f"gigatoken does not load it ({str(error).splitlines()[0]:.200})"


def _part(ids: np.ndarray, ends: np.ndarray, number: int) -> np.ndarray:
    return ids[ends[number - 1] if number else 0 : ends[number]]


def _joined(ids: list[np.ndarray], num_compared: int, differing: list[int]) -> Encoded:
    flat = np.concatenate(ids) if ids else np.empty(0, np.uint32)
    return Encoded(flat, np.cumsum([len(part) for part in ids], dtype=np.int64), num_compared, differing)
