"""A byte-level BPE tokenizer of chosen size, trained on one's own text and built like GPT-NeoX's.

    python train_tokenizer.py --input samples/pubmed/train.jsonl --vocab_size 4096 --output_dir tokenizer_4096
    python train_tokenizer.py --manifest corpus.txt --vocab_size 50257 --chat --output_dir tokenizer_chat

Reads   .jsonl, .json, .parquet (column "text", or --column) and .txt, .md (every line a document), all but Parquet also as .gz
        or .zst; folders and patterns of them, or a --manifest as build_pretrain.py takes it
Writes  OUTPUT_DIR/tokenizer.json, tokenizer_config.json, special_tokens_map.json  for AutoTokenizer
        OUTPUT_DIR/chat_template.jinja  with --chat: turns between <|im_start|> and <|im_end|>, replies marked for training
        OUTPUT_DIR/meta.json  sources, documents, bytes per token, tokens per word, speed, versions, fingerprint

<|endoftext|> is id 0, <|padding|> 1, with --chat <|im_start|> 2 and <|im_end|> 3. The same text and size give the same
tokenizer. Any text comes back from its ids unchanged but for Unicode's NFC normalisation, which GPT-NeoX applies too; that is
checked on a sample before the folder appears, whole or not at all. Documents are read one after another: memory grows with the
number of different words, which --max_bytes bounds.
"""

import hashlib
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import orjson
import pyarrow.parquet as pq
import tyro
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lm.args import below, check, parse
from lm.corpus import File, digest, find_files, kind_of, open_bytes, read_manifest
from lm.documents import EMPTY, Piece, Reading, documents, where
from lm.files import read_json, sha256, whole_folder, write_json
from lm.records import records
from lm.tokenizer import encode_documents, fingerprint, load_tokenizer, save_tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = Path(__file__).parent / "lm/chat_template.jinja"
MAX_BYTES = 2_000_000_000  # some ten minutes
CHECKED_BYTES = 4_000_000  # of text, from all files alike: for the round trip and what is measured
BATCH_DOCUMENTS = 64  # encoded at once
PART_CHARACTERS = 2**20  # tokenizers takes 256 texts from us at once: a long document comes in parts
NO_TEXT = "is empty, text is needed: leave it out, or let what writes it finish"
WORD_END = re.compile(r"(?<=\S) (?=\S)")  # no pre-token of GPT-NeoX's goes on over this


@dataclass(frozen=True, kw_only=True)
class Args:
    input: tuple[str, ...] = ()
    """Files, folders (all files below them) or patterns. Leave validation and test text out."""
    manifest: Path | None = None
    """A file with the path of one file on each line, instead of --input."""
    output_dir: Path
    """Folder of the tokenizer; it must be new, empty, or hold what this very command made."""
    vocab_size: int = 4096
    """Number of ids, special tokens included (at least 258, with --chat 260)."""
    chat: bool = False
    """Also make <|im_start|> and <|im_end|> special tokens, and add a chat template."""
    column: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--text_column",))] = ("text",)
    """Where a row of JSON Lines or Parquet has its text: the first of these that the file's first row has (that of
    build_data_splits.py has input_text)."""
    max_bytes: int = MAX_BYTES
    """Text that is read at most, in bytes of UTF-8: the first documents of each file, by its share of the size of all."""

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return SPECIAL_TOKENS + CHAT_TOKENS if self.chat else SPECIAL_TOKENS

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found, least = below(self, 1, "max_bytes"), 256 + len(self.special_tokens)  # every byte is a token
        if self.vocab_size < least:
            found.append(
                f"--vocab_size {self.vocab_size} is too small, at least {least} is needed "
                f"(256 bytes and {len(self.special_tokens)} special tokens): pass a larger one"
            )
        if bool(self.input) == bool(self.manifest):
            found.append(f"--input {' '.join(map(str, self.input))} and --manifest {self.manifest}: pass one of them")
        return found


def read_texts(file: File, columns: Sequence[str] = ("text",)) -> Iterator[str]:
    """The documents of one file, one at a time; those of white space alone are left out.

    Raises: ValueError naming file and line (Parquet: row) of what is no document, or a file without any.
    """
    piece, found = Piece((file.name,), file.size or 0), False
    for document in documents(piece, 0, Reading(column_of(file.name, columns), "line", shuffle_window=0)):
        if document.text is not None:
            found = True
            yield document.text
        elif document.fault != EMPTY:
            raise ValueError(f"{where(piece, document)} is no document: {document.fault}; mend it, or leave the file out")
    if not found:
        raise ValueError(f"{file.name} {NO_TEXT}")


def column_of(name: str, columns: Sequence[str]) -> str:
    """The first of these columns that the first row of a file has; if it has none, or cannot be read, the first of all."""
    names: Any = ()
    try:
        if kind_of(name) == "parquet":
            with open_bytes(name) as stream:
                names = pq.read_schema(stream).names
        elif kind_of(name) == "jsonl":
            first = next(records(name, 0, None, columns[0], "line"), None)
            names = orjson.loads(first.content or b"") if first else ()
    except (ValueError, OSError):  # pyarrow's and orjson's too: whoever reads the file will name it
        pass
    return next((column for column in columns if isinstance(names, dict | list) and column in names), columns[0])


def sample(files: Sequence[File], columns: Sequence[str], max_bytes: int, read: Counter) -> Iterator[str]:
    """The first documents of each file until what was read of all is `max_bytes` times the share of the files so far.

    Args: read: counts "documents", their "bytes", and files that were not read to the end ("cut").
    """
    total, before = sum(file.size for file in files), 0
    for file in files:
        before += file.size
        enough = max_bytes * before // total
        if read["bytes"] >= enough:
            read["cut"] += 1
            continue
        for text in read_texts(file, columns):
            read.update(documents=1, bytes=len(text.encode()))
            yield text
            if read["bytes"] >= enough:
                read["cut"] += 1
                break


def in_parts(text: str) -> Iterator[str]:
    """A text in parts that have the same pre-tokens as the whole."""
    start = 0
    while cut := WORD_END.search(text, start + PART_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def train(texts: Iterator[str], vocab_size: int, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with GPT-NeoX's normaliser and pre-tokeniser."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *(CHAT_TOKENS if chat else ())],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator((part for text in texts for part in in_parts(text)), trainer)
    end, padding = SPECIAL_TOKENS
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=padding,
        clean_up_tokenization_spaces=False,
        **({"extra_special_tokens": list(CHAT_TOKENS)} if chat else {}),
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return tokenizer


def measure(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str]) -> dict[str, float]:
    """What the tokenizer makes of texts, every one of which must survive a round trip.

    Returns "bytes_per_token"; "tokens_per_word", its fertility (Rust et al., arXiv 2012.15613) with what white space separates
    as words; "encoding_mb_per_sec", 10^6 bytes a second by Hugging Face's tokenizers.
    Raises: RuntimeError with the beginning of a text that does not.
    """
    num_bytes, num_tokens, num_words, seconds = 0, 0, 0, 0.0
    normaliser = tokenizer.backend_tokenizer.normalizer
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        begin = time.perf_counter()
        encoded = encode_documents(tokenizer, batch)
        seconds += time.perf_counter() - begin
        for text, ids in zip(batch, encoded, strict=True):
            text = normaliser.normalize_str(text) if normaliser else text  # whose Unicode tables may be older than Python's
            if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
                raise RuntimeError(f"a document does not come back from its ids: {text!r:.200}")
            num_bytes, num_tokens = num_bytes + len(text.encode()), num_tokens + len(ids)
            num_words += len(text.split())
    rates = {"bytes_per_token": num_bytes / max(num_tokens, 1), "tokens_per_word": num_tokens / max(num_words, 1)}
    rates |= {"encoding_mb_per_sec": num_bytes / 1e6 / seconds}
    return {name: round(value, 3) for name, value in rates.items()}


def recipe_of(args: Args, files: Sequence[File]) -> dict[str, Any]:
    """All that decides the tokenizer. Files of which not all is read, or that a manifest lists, are known by size and time."""
    recipe: dict[str, Any] = {"format": "tokenizer-1", "vocab_size": args.vocab_size}
    size = sum(file.size for file in files)
    if args.manifest or size > args.max_bytes:
        recipe["source"] = {"files": digest(files), "num_files": len(files), "size": size}
    else:
        recipe["sources"] = [{"file": Path(f.name).name, "size": f.size, "sha256": sha256(f.name)} for f in files]
    if args.max_bytes != MAX_BYTES:
        recipe["max_bytes"] = args.max_bytes
    if args.column != ("text",):
        recipe["column"] = list(args.column)
    if args.chat:
        recipe["chat_template"] = hashlib.sha256(CHAT_TEMPLATE.read_bytes()).hexdigest()
    return recipe


def is_done(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether `folder` holds, undamaged, what `recipe` makes.

    Raises: ValueError when it holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return False
    meta = read_json(folder / "meta.json", "train_tokenizer.py") if (folder / "meta.json").is_file() else None
    if not isinstance(meta, dict) or not isinstance(meta.get("recipe"), dict):
        raise ValueError(f"{folder} was not made by train_tokenizer.py: pass another --output_dir, or move it away")
    there = meta["recipe"]
    differ = [
        f"{key}: {there.get(key)!r:.200} there, {recipe.get(key)!r:.200} now"
        for key in recipe | there
        if there.get(key) != recipe.get(key)
    ]
    if differ:
        raise ValueError(
            f"{folder} holds another tokenizer ({'; '.join(differ)}): pass another --output_dir, or delete the folder"
        )
    return all((folder / name).is_file() and sha256(folder / name) == digest for name, digest in meta["files"].items())


def main(args: Args) -> None:
    check(args.faults())
    files = read_manifest(args.manifest) if args.manifest else find_files([str(path) for path in args.input])
    check([f"{file.name} {NO_TEXT}" for file in files if not file.size])
    recipe = recipe_of(args, files)
    if is_done(args.output_dir, recipe):
        print(f"nothing to do: {args.output_dir} is the tokenizer of these files")
        return
    print(f"training {args.vocab_size:,} ids on {sum(file.size for file in files):,} bytes of {len(files):,} files", flush=True)
    with whole_folder(args.output_dir) as folder:
        read, begin = Counter(), time.perf_counter()
        save_tokenizer(train(sample(files, args.column, args.max_bytes, read), args.vocab_size, args.chat), folder)
        training_mb_per_sec = round(read["bytes"] / 1e6 / (time.perf_counter() - begin), 3)
        tokenizer = load_tokenizer(folder)
        measured = measure(tokenizer, sample(files, args.column, CHECKED_BYTES, Counter()))
        facts = {
            "recipe": recipe,
            "vocab_size": len(tokenizer),
            "num_documents": read["documents"],
            "num_bytes": read["bytes"],
            "num_files_cut": read["cut"],
            **{name: measured[name] for name in ("bytes_per_token", "tokens_per_word")},
            "speed": {"training_mb_per_sec": training_mb_per_sec, "encoding_mb_per_sec": measured["encoding_mb_per_sec"]},
            "fingerprint": fingerprint(tokenizer),
            "versions": {package: version(package) for package in ("tokenizers", "transformers")},
            "files": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        }
        write_json(folder / "meta.json", facts)
    report(args, facts)


def report(args: Args, facts: dict[str, Any]) -> None:
    """Say what was made, of how much text, and how fast."""
    print(
        f"{args.output_dir}: {facts['vocab_size']:,} ids from {facts['num_documents']:,} documents, "
        f"{facts['bytes_per_token']} bytes per token, {facts['tokens_per_word']} tokens per word"
    )
    training, encoding = facts["speed"].values()
    print(f"trained at {training} MB/s, encodes {encoding} MB/s (Hugging Face's tokenizers)")
    if cut := facts["num_files_cut"]:
        print(f"of {cut:,} files the first documents or none were read, {facts['num_bytes']:,} bytes of text (--max_bytes)")
    if facts["vocab_size"] < args.vocab_size:
        print(f"the text has no more pairs to merge: {facts['vocab_size']:,} ids instead of {args.vocab_size:,}")


if __name__ == "__main__":
    main(parse(Args))
