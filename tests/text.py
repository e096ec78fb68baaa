"""Real English that every Python installation carries, and a paper store made of it with the product's own writer."""

from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm.paper_writer import PaperWriter
from lm.tokenizer import encode_documents, fingerprint, token_dtype

CATEGORIES = ("expressions", "objects", "operators", "statements")
SPLITS = {"train": 12, "validation": 3, "test": 3}  # papers of each category


def documents() -> list[str]:
    """The Python language reference, 500 kB of prose, cut into documents of 3,000 characters."""
    text = "\n".join(topics[name] for name in sorted(topics))
    return [text[i : i + 3000] for i in range(0, len(text), 3000)]


def byte_level_bpe(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A small tokenizer of GPT-NeoX's kind, trained on the documents."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|padding|>")


def write_store(folder: Path) -> Path:
    """A finished paper store: four categories, 18 papers of about 1,200 tokens in each."""
    tokenizer = byte_level_bpe()
    header = {
        "dtype": token_dtype(len(tokenizer)),
        "vocab_size": len(tokenizer),
        "tokenizer": {"name": "byte_level_bpe", "fingerprint": fingerprint(tokenizer)},
        "source": {"dataset": "the Python language reference"},
    }
    writer = PaperWriter(folder, header, SPLITS)
    papers = iter(encode_documents(tokenizer, documents()))
    for split, count in SPLITS.items():
        for category in CATEGORIES:
            for _ in range(count):
                writer.add(split, category, next(papers))
    writer.finish(tokenizer)
    return folder
