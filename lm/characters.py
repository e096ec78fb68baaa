"""Characters as tokens: a text is put through Unidecode and lower case, and each of its 75 possible characters is a token.

Text and vocabulary are those of the small-GPT journal (github.com/jeremyadamsfisher/shakespeare_transformer): the lower-cased
characters of `string.printable`, space and en dash in sorted order; before them <|endoftext|>, which ends documents here. They
are constants of this code and never collected from a text. Unidecode leaves ASCII, so a control character that is not in
`string.printable` is dropped and nothing that can be printed is; what Unidecode has no ASCII for, as an emoji, it leaves out
itself. tokenizer.json cannot hold Unidecode: the tokenizer says in its configuration that texts are to be prepared, and raises
for a character that it does not know. No transformers at import: worker processes import this.
"""

import json
import string
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from unidecode import unidecode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
CHARACTERS = "".join(sorted({*string.printable.lower(), " ", "\N{EN DASH}"}))  # character i has id i + 1
PREPARE = f"unidecode {version('Unidecode')}, lower case"  # another version may give other texts


class _Simplified(dict):
    """What each code point becomes; filled as they are met, since Unidecode looks at one at a time."""

    def __missing__(self, code_point: int) -> str:
        found = unidecode(chr(code_point)).lower()
        self[code_point] = "".join(character for character in found if character in CHARACTERS)
        return self[code_point]


_SIMPLIFIED = _Simplified()


def simplify(text: str) -> str:
    """The text in nothing but CHARACTERS."""
    return text.translate(_SIMPLIFIED)


def preparation(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    """What a tokenizer needs done to a text first: PREPARE, or None. Raises: ValueError for what is not known here."""
    asked = tokenizer.init_kwargs.get("prepare")
    if asked not in (None, PREPARE):
        raise ValueError(
            f"the tokenizer needs texts prepared by {asked!r:.80}, here that is {PREPARE!r}: install that version of Unidecode,"
            " or take another tokenizer"
        )
    return asked


def prepare_text(tokenizer: "PreTrainedTokenizerFast", text: str) -> str:
    """The text as the tokenizer needs it: simplified for one that asks for it, as it is for all others."""
    return text if preparation(tokenizer) is None else simplify(text)


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """The tokenizer whose tokens are CHARACTERS; decoding gives the characters back and adds none."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(), eos_token=END, clean_up_tokenization_spaces=False, prepare=PREPARE
    )


def _backend() -> Tokenizer:
    """Without an unknown token, so that an unknown character is an error."""
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate([END, *CHARACTERS])}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


class CharacterTable:
    """Encodes simplified texts by one look into a table, tens of times faster than Hugging Face's tokenizers."""

    name = "a table of characters"

    def __init__(self):
        self._ids = np.zeros(ord(max(CHARACTERS)) + 2, np.uint32)  # 0, which is no character's, for all others
        self._ids[[ord(character) for character in CHARACTERS]] = np.arange(1, len(CHARACTERS) + 1)

    @staticmethod
    def is_for(tokenizer_json: str) -> bool:
        """Whether it is this tokenizer's rules and vocabulary that tokenizer.json holds."""
        found, ours = json.loads(tokenizer_json), json.loads(_backend().to_str())
        return all(found.get(part) == ours[part] for part in ("normalizer", "pre_tokenizer", "model"))

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts (uint32), and where each text's end (int64). Raises: ValueError for any other character."""
        text = "".join(texts)
        ids = self._ids[np.minimum(np.frombuffer(text.encode("utf-32-le"), "<u4"), len(self._ids) - 1)]
        if not ids.all():
            unknown = text[int(np.argmin(ids))]
            raise ValueError(f"{unknown!r} is none of the {len(CHARACTERS)} characters that are tokens: prepare the text first")
        return ids, np.cumsum([len(text) for text in texts], dtype=np.int64)
