"""A small tokenizer that can chat, and a small model for it."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lm.models import build_model
from lm.tokenizer import special_ids

TEMPLATE = (Path(__file__).parents[1] / "lm/chat_template.jinja").read_text()
SPECIAL = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]


def chat_tokenizer(rows: list[dict], vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """What train_tokenizer.py --chat makes, trained on conversations."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((message["content"] for row in rows[:300] for message in row["messages"]), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[1], extra_special_tokens=SPECIAL[2:]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def base_model(folder: Path, tokenizer: PreTrainedTokenizerFast, positions: int = 128) -> None:
    """A folder with random weights and the tokenizer; its vocabulary is padded."""
    torch.manual_seed(0)
    model = build_model("neox-64x2", len(tokenizer) + 12, positions, special_ids(tokenizer))
    model.config.max_position_embeddings = positions
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
