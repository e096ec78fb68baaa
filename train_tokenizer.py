"""A byte-level BPE tokenizer of chosen size, trained on one's own text and built like GPT-NeoX's.

    python train_tokenizer.py --input samples/pubmed/train.jsonl --vocab_size 4096 --output_dir tokenizer_4096

Reads   .txt (every line a document), .jsonl and .parquet (column "text", or --column); a folder stands for such files in it
Writes  OUTPUT_DIR/tokenizer.json, tokenizer_config.json  for AutoTokenizer; <|endoftext|> is id 0, <|padding|> id 1
        OUTPUT_DIR/meta.json  sources with checksums, documents, bytes per token, versions, fingerprint

The same text and size give the same tokenizer. Any text comes back from its ids unchanged but for Unicode's NFC
normalisation, which GPT-NeoX applies too; that is checked before the folder appears, whole or not at all.
"""

import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lm.args import check, parse
from lm.files import read_json, sha256, whole_folder, write_json
from lm.tokenizer import check_text, encode_documents, fingerprint, load_tokenizer

SUFFIXES = (".jsonl", ".parquet", ".txt")
SPECIAL_TOKENS = ("<|endoftext|>", "<|padding|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte is a token, so that no text is unknown
CHECKED_DOCUMENTS = 200  # of each file, its first ones: for the round trip and the bytes per token


@dataclass(frozen=True, kw_only=True)
class Args:
    input: tuple[Path, ...]
    """Files (.txt, .jsonl, .parquet) or folders of them. Leave validation and test text out."""
    output_dir: Path
    """Folder of the tokenizer; it must be new, empty, or hold what this very command made."""
    vocab_size: int = 4096
    """Number of ids, special tokens included (at least 258)."""
    column: tuple[str, ...] = ("text",)
    """Where a row of .jsonl or .parquet has its text: the first of these that it has (that of build_data_splits.py has
    input_text)."""


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The files that `inputs` stand for, those of a folder by name.

    Raises: ValueError listing every input that stands for no readable kind of file.
    """
    files, faults = [], []
    for path in inputs:
        found = sorted(item for item in path.iterdir() if item.suffix in SUFFIXES) if path.is_dir() else [path]
        if not path.exists():
            faults.append(f"no {path}: pass --input existing files, for real text to start with run fetch_samples.py")
        elif not found:
            faults.append(f"{path} holds no {', '.join(SUFFIXES)} file: pass --input another folder, or files")
        elif found[0].suffix not in SUFFIXES:
            faults.append(f"{path} ends in {path.suffix!r}, one of {', '.join(SUFFIXES)} is needed: convert or rename it")
        files.extend(found)
    check(faults)
    return files


def read_texts(path: Path, columns: Sequence[str] = ("text",)) -> Iterator[str]:
    """The documents of one file, one at a time.

    Raises: ValueError naming file and line (parquet: row) of a document that is missing or no text, and an empty file.
    """
    number = 0
    rows = _read_parquet(path, columns) if path.suffix == ".parquet" else _read_lines(path, columns)
    for number, text in enumerate(rows, 1):
        check_text(text, f"{path} {'row' if path.suffix == '.parquet' else 'line'} {number}")
        yield text
    if number == 0:
        raise ValueError(f"{path} is empty, text is needed: leave it out, or let what writes it finish")


def _read_lines(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The lines of a .txt file with their ends, or of each row of a .jsonl file the first column that it has."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if path.suffix == ".txt":
                    yield line.decode()
                else:
                    row = json.loads(line)
                    yield row[next((column for column in columns if column in row), columns[0])]
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} line {number} is not UTF-8 ({error}): convert the file") from None
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error}): make the file again") from None
            except (KeyError, TypeError, IndexError):
                needed = " or ".join(f'"{column}"' for column in columns)
                raise ValueError(f"{path} line {number} is {line[:60]!r}, an object with {needed} is needed") from None


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    """The values of the first of these columns that there is, few rows in memory at once."""
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a parquet file ({error}): make or download it again") from None
    with file:
        names = file.schema_arrow.names
        column = next((column for column in columns if column in names), None)
        if column is None:
            needed = " or ".join(f'"{column}"' for column in columns)
            raise ValueError(f"{path} has columns {names}, {needed} is needed: pass --column")
        for batch in file.iter_batches(batch_size=64, columns=[column]):
            yield from batch.column(0).to_pylist()


def train(
    files: list[Path], vocab_size: int, num_documents: Counter[Path], columns: Sequence[str] = ("text",)
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with GPT-NeoX's normaliser and pre-tokeniser; counts each file's documents on the way."""

    def texts() -> Iterator[str]:
        for path in files:
            for text in read_texts(path, columns):
                num_documents[path] += 1
                yield text

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(texts(), trainer)
    end, padding = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token=padding,
        clean_up_tokenization_spaces=False,
    )


def bytes_per_token(tokenizer: PreTrainedTokenizerFast, files: Iterable[Path], columns: Sequence[str] = ("text",)) -> float:
    """UTF-8 bytes per token over the first `CHECKED_DOCUMENTS` of each file, every one of which must survive a round trip.

    Raises: RuntimeError naming the file with a document that does not.
    """
    num_bytes = num_tokens = 0
    for path in files:
        for text in islice(read_texts(path, columns), CHECKED_DOCUMENTS):
            (ids,) = encode_documents(tokenizer, [text])
            text = unicodedata.normalize("NFC", text)
            if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
                raise RuntimeError(f"a document of {path} does not come back from its ids: {text!r:.200}")
            num_bytes += len(text.encode())
            num_tokens += len(ids)
    return round(num_bytes / max(num_tokens, 1), 3)


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
    if args.vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab_size {args.vocab_size} is too small, at least {SMALLEST_VOCABULARY} is needed "
            f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens): pass a larger one"
        )
    files = find_files(args.input)
    sources = [{"file": path.name, "size": path.stat().st_size, "sha256": sha256(path)} for path in files]
    recipe = {"format": "tokenizer-1", "vocab_size": args.vocab_size, "sources": sources}
    if args.column != ("text",):
        recipe["column"] = list(args.column)
    if is_done(args.output_dir, recipe):
        print(f"nothing to do: {args.output_dir} is the tokenizer of these files")
        return
    print(f"training {args.vocab_size:,} ids on {sum(source['size'] for source in sources):,} bytes", flush=True)
    num_documents: Counter[Path] = Counter()
    with whole_folder(args.output_dir) as folder:
        train(files, args.vocab_size, num_documents, args.column).save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        facts = {
            "recipe": recipe,
            "vocab_size": len(tokenizer),
            "num_documents": sum(num_documents.values()),
            "bytes_per_token": bytes_per_token(tokenizer, files, args.column),
            "fingerprint": fingerprint(tokenizer),
            "versions": {package: version(package) for package in ("tokenizers", "transformers")},
            "files": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        }
        write_json(folder / "meta.json", facts)
    print(
        f"{args.output_dir}: {len(tokenizer):,} ids from {facts['num_documents']:,} documents, "
        f"{facts['bytes_per_token']} bytes per token"
    )
    if len(tokenizer) < args.vocab_size:
        print(f"the text has no more pairs to merge: {len(tokenizer):,} ids instead of {args.vocab_size:,}")


if __name__ == "__main__":
    main(parse(Args))
