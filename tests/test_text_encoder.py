"""The fast encoder gives Hugging Face's ids, and where it does not, they are taken."""

import json
from pathlib import Path

import numpy as np
import pytest
from text import byte_level_bpe, documents
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import lm.text_encoder
from lm.text_encoder import TextEncoder
from lm.tokenizer import encode_documents, load_tokenizer

AWKWARD = [
    *("", " ", "a", "\n\n \t", "<|endoftext|>", "a<|padding|>b", "\0\x7f", "x" * 5000, "  def f(x):\n        return x\n"),
    *("naïve café — “quoted” 中文 🙂", "e\u0301 \u1e9b\u0323", "\ufeffBOM", "A\u00a0B\u3000C"),
    *("1234567 3.14 1,000", "don't they'll I'M"),
]


def parts(encoded) -> list[list[int]]:
    return [ids.tolist() for ids in np.split(encoded.ids, encoded.ends[:-1])]


@pytest.fixture(scope="module")
def neox(neox_tokenizer_dir) -> str:
    return (Path(neox_tokenizer_dir) / "tokenizer.json").read_text()


def test_real_text_and_awkward_strings_have_the_ids_of_the_reference(neox, neox_tokenizer_dir):
    texts = [*AWKWARD, *documents()]
    encoder = TextEncoder(neox)
    assert (encoder.name, encoder.why_not_fast) == ("gigatoken 0.10.0", None)
    encoded = encoder.encode(texts, range(len(texts)))
    assert (encoded.num_compared, encoded.differing) == (len(texts), [])
    expected = [ids.tolist() for ids in encode_documents(load_tokenizer(neox_tokenizer_dir), texts)]
    assert parts(encoded) == expected
    assert parts(encoder.encode(texts)) == expected
    assert encoder.encode([]).ids.tolist() == []


def test_our_own_tokenizers_are_encoded_fast_and_alike():
    tokenizer, texts = byte_level_bpe(400), [*AWKWARD, *documents()]
    encoder = TextEncoder(tokenizer.backend_tokenizer.to_str())
    assert encoder.why_not_fast is None
    assert parts(encoder.encode(texts)) == [ids.tolist() for ids in encode_documents(tokenizer, texts)]


def test_a_document_that_differs_gets_the_ids_of_the_reference_and_is_named(neox, neox_tokenizer_dir):
    """Telugu U+0C3C is newer than the Unicode tables that Hugging Face's normalizer has."""
    texts = ["before", "e\u0c3c\u0301", "between", "e\u0c3c\u0301 again"]
    encoder, exact = TextEncoder(neox), [i.tolist() for i in encode_documents(load_tokenizer(neox_tokenizer_dir), texts)]
    unseen = parts(encoder.encode(texts))
    assert [unseen[i] == exact[i] for i in range(4)] == [True, False, True, False]
    one = encoder.encode(texts, [0, 1])
    assert (one.num_compared, one.differing, parts(one)) == (2, [1], [*exact[:3], unseen[3]])
    every = encoder.encode(texts, range(4))
    assert (every.differing, parts(every)) == ([1, 3], exact)


def test_a_tokenizer_that_gigatoken_does_not_know_is_encoded_by_the_reference():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder = TextEncoder(backend.to_str())
    assert encoder.name.startswith("tokenizers ")
    assert encoder.why_not_fast.startswith("gigatoken does not load it (")
    encoded = encoder.encode(["a b c", "", "b"])
    assert (parts(encoded), encoded.num_compared) == ([[0, 1, 2], [], [1]], 3)


def test_without_gigatoken_the_reference_does_the_work(neox, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gigatoken", None)
    encoder = TextEncoder(neox)
    assert encoder.why_not_fast.startswith("gigatoken is not installed (")
    assert parts(encoder.encode(["Hello, I am"])) == [[12092, 13, 309, 717]]


def test_truncation_and_padding_in_the_file_change_nothing(neox, monkeypatch):
    rules = json.loads(neox)
    backend = Tokenizer.from_str(neox)
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    rules |= {key: json.loads(backend.to_str())[key] for key in ("truncation", "padding")}
    text = "one two three four five six"
    expected = parts(TextEncoder(neox).encode([text]))
    for _ in ("gigatoken", "the reference alone"):
        encoded = TextEncoder(json.dumps(rules)).encode([text], [0])
        assert (parts(encoded), encoded.differing) == (expected, [])
        monkeypatch.setattr(lm.text_encoder, "_load_fast", lambda _: (None, "not today"))


def test_the_module_imports_neither_transformers_nor_torch():
    import subprocess
    import sys

    code = "import sys, lm.piece_packer; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=Path(lm.text_encoder.__file__).parents[1], capture_output=True)
    assert found.stdout == b"[]\n"


def test_a_tokenizer_that_gigatoken_takes_for_another_is_encoded_by_the_reference():
    """It loads one that does not split text into words before it merges, and splits."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["The quick Brown fox, 12345 jumps! It is now."] * 20, trainer)
    encoder = TextEncoder(backend.to_str())
    assert encoder.why_not_fast == "gigatoken 0.10.0 encodes 'The quick Brown fox, 12345 jumps!' differently"
    assert encoder.name.startswith("tokenizers ")
    assert parts(encoder.encode(["The quick Brown fox"])) == [backend.encode("The quick Brown fox").ids]
