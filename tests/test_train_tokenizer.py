"""train_tokenizer.py: the same text gives the same tokenizer, no text is lost in it, and bad text is named."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_tokenizer
from build_pretrain import Args as Packing
from build_pretrain import main as build_pretrain
from lm.checkpoint import Checkpoints
from lm.corpus import find_files
from lm.files import read_json, sha256
from lm.models import build_model
from lm.tokenizer import encode_documents, fingerprint, load_tokenizer
from train_tokenizer import Args, in_parts, main, measure, read_texts, sample, train

ROOT = Path(__file__).parents[1]
HARD_TEXTS = [
    "Ωmega µ \u00a0 tabs\t\tand   spaces \r\n\r\n end ",
    "日本語 🧪👩‍🔬 \x00\x01 \u202e \ufffd",
    "<|endoftext|><|padding|> in the text",
    " leading, and don't you're we'll  ",
    "",
]


def write_jsonl(path: Path, texts: list) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": "a"}) + "\n" for text in texts))
    return path


def write_parquet(path: Path, texts: list, column: str = "text") -> Path:
    pq.write_table(pa.table({"label": ["a"] * len(texts), column: texts}), path, row_group_size=2)
    return path


def texts_of(path: Path, columns=("text",)) -> list[str]:
    (file,) = find_files([str(path)])
    return list(read_texts(file, columns))


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir())}


@pytest.fixture
def text_file(tmp_path) -> Path:
    return write_jsonl(tmp_path / "some.jsonl", ["the cat and the other cat sat on the mat " * 5, *HARD_TEXTS])


@pytest.fixture(scope="module")
def abstracts(samples, tmp_path_factory) -> Path:
    """The first thousand real training abstracts."""
    path = tmp_path_factory.mktemp("abstracts") / "train.jsonl"
    path.write_bytes(b"".join((samples / "pubmed/train.jsonl").read_bytes().splitlines(keepends=True)[:1_000]))
    return path


def test_real_text_gives_a_tokenizer_of_the_size_asked_for(abstracts, tmp_path, capsys):
    main(Args(input=(abstracts,), output_dir=tmp_path / "bundle", vocab_size=2_000))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bundle")
    assert len(tokenizer) == 2_000
    assert tokenizer.convert_ids_to_tokens([0, 1]) == ["<|endoftext|>", "<|padding|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 1)
    meta = read_json(tmp_path / "bundle/meta.json", "train_tokenizer.py")
    assert meta["recipe"] == {
        "format": "tokenizer-1",
        "vocab_size": 2_000,
        "sources": [{"file": "train.jsonl", "size": abstracts.stat().st_size, "sha256": sha256(abstracts)}],
    }
    assert (meta["vocab_size"], meta["num_documents"]) == (2_000, 1_000)
    assert meta["fingerprint"] == fingerprint(load_tokenizer(tmp_path / "bundle"))
    assert meta["files"] == {name: digest for name, digest in files_of(tmp_path / "bundle").items() if name != "meta.json"}
    assert 3.2 < meta["bytes_per_token"] < 3.8  # GPT-NeoX's 50,277 ids reach 4.957 on these texts
    texts = texts_of(abstracts)
    ids, words = (sum(map(len, found)) for found in (encode_documents(tokenizer, texts), map(str.split, texts)))
    assert meta["num_bytes"] == sum(len(text.encode()) for text in texts)
    assert meta["tokens_per_word"] == round(ids / words, 3)
    assert all(rate > 0.01 for rate in meta["speed"].values())
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"{tmp_path}/bundle: 2,000 ids from 1,000 documents, {meta['bytes_per_token']} bytes per token, "
        f"{meta['tokens_per_word']} tokens per word",
        "trained at {training_mb_per_sec} MB/s, encodes {encoding_mb_per_sec} MB/s (Hugging Face's tokenizers)".format(
            **meta["speed"]
        ),
    ]
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    assert json.loads((tmp_path / "bundle/special_tokens_map.json").read_text()) == special | {"pad_token": "<|padding|>"}


def test_the_ids_are_those_of_earlier_versions(abstracts, tmp_path):
    """The checksum is of what the version before --chat made of these texts."""
    main(Args(input=(abstracts,), output_dir=tmp_path / "bundle", vocab_size=2_000))
    assert sha256(tmp_path / "bundle/tokenizer.json") == "9decba419f90e23680be3e1177600c65f8a9255187a73db0735b430e0c1df2a6"


def test_it_splits_text_as_neox_does(abstracts, neox_tokenizer_dir):
    ours = train(iter(texts_of(abstracts)), 300).backend_tokenizer
    neox = load_tokenizer(neox_tokenizer_dir).backend_tokenizer
    for part in ("normalizer", "pre_tokenizer"):
        assert json.loads(ours.to_str())[part] == json.loads(neox.to_str())[part]
    assert ours.pre_tokenizer.pre_tokenize_str("a b 12, c") == neox.pre_tokenizer.pre_tokenize_str("a b 12, c")


def test_every_text_comes_back_from_its_ids():
    tokenizer = train(iter(["only plain words"]), 258)
    assert [tokenizer.decode(ids) for ids in encode_documents(tokenizer, HARD_TEXTS)] == HARD_TEXTS


def test_text_outside_nfc_comes_back_in_nfc():
    tokenizer = train(iter(["cafe\u0301 \u212b"]), 258)
    (ids,) = encode_documents(tokenizer, ["cafe\u0301 \u212b"])
    assert tokenizer.decode(ids) == "café Å"
    found = measure(tokenizer, iter(["cafe\u0301 \u212b"]))
    assert (found["bytes_per_token"], found["tokens_per_word"]) == (1.0, 4.0)


def test_a_tokenizer_that_loses_text_is_not_published(text_file, tmp_path, monkeypatch):
    def losing(*values):
        tokenizer = train(*values)
        tokenizer.backend_tokenizer.normalizer = None
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return tokenizer

    monkeypatch.setattr(train_tokenizer, "train", losing)
    with pytest.raises(RuntimeError, match="does not come back from its ids: 'the cat"):
        main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=258))
    assert [path.name for path in tmp_path.iterdir()] == [text_file.name]


PIECES = st.text(max_size=12) | st.sampled_from(
    [
        *HARD_TEXTS,
        "\r",
        "\r\n",
        "\n\n  ",
        "<|im_start|>",
        "<|im_end|>",
        "\u0600\u202e\u05e9\u05dc",
        "👨‍👩‍👧‍👦\ufe0f",
        "e\u0301",
        "\x7f\x85",
    ]
)


@pytest.fixture(scope="module")
def chat(abstracts) -> PreTrainedTokenizerFast:
    return train(iter(texts_of(abstracts)), 1_000, True)


@given(parts=st.lists(PIECES, max_size=6))
def test_any_text_comes_back_and_holds_no_control_token(chat, parts):
    text = "".join(parts)
    (ids,) = encode_documents(chat, [text])
    assert chat.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)
    assert not set(ids.tolist()) & {0, 1, 2, 3}


@given(parts=st.lists(PIECES | st.sampled_from([" a", "b ", " 's", "  ", "\t", "."]), max_size=12))
def test_parts_of_a_text_have_the_words_of_the_whole(parts):
    text, words = "".join(parts), pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokenizer, "PART_CHARACTERS", 3)
        found = list(in_parts(text))
    assert "".join(found) == text
    of_parts = [word for part in found for word, _ in words.pre_tokenize_str(part)]
    assert of_parts == [word for word, _ in words.pre_tokenize_str(text)]


def test_a_long_text_comes_in_parts():
    assert [len(part) for part in in_parts("words " * 500_000)] == [2**20 + 1, 2**20 + 2, 3_000_000 - 2**21 - 3]


def test_same_text_gives_the_same_files_in_another_process(abstracts, tmp_path):
    for name, seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, ROOT / "train_tokenizer.py", "--input", abstracts, "--vocab_size", "600"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([*command, "--output_dir", tmp_path / name], cwd=ROOT, check=True, env=environment)
    meta = [read_json(tmp_path / name / "meta.json", "") for name in "ab"]
    assert meta[0].pop("speed").keys() == meta[1].pop("speed").keys()
    assert meta[0] == meta[1]
    assert meta[0]["files"] == {name: sha for name, sha in files_of(tmp_path / "b").items() if name != "meta.json"}


def test_files_of_all_kinds_hold_the_same_documents(tmp_path):
    texts = ["one\ntwo", "three", "vier €"] * 100
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", texts)) == texts
    assert texts_of(write_parquet(tmp_path / "a.parquet", texts)) == texts
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.jsonl.zst").write_bytes(pa.Codec("zstd").compress((tmp_path / "a.jsonl").read_bytes(), asbytes=True))
    assert texts_of(tmp_path / "a.jsonl.gz") == texts_of(tmp_path / "a.jsonl.zst") == texts
    (tmp_path / "a.txt").write_bytes("one\r\n\n \ntwo\nvier €".encode())
    assert texts_of(tmp_path / "a.txt") == ["one\r\n", "two\n", "vier €"]


def test_the_text_may_stand_in_another_column(tmp_path, capsys):
    texts = ["some text " * 3, *HARD_TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"input_text": text, "text": "no"}) + "\n" for text in texts))
    write_parquet(tmp_path / "b.parquet", texts, column="input_text")
    for name in ("a.jsonl", "b.parquet"):
        args = Args(input=(tmp_path / name,), output_dir=tmp_path / name[0], vocab_size=270, column=("input_text",))
        main(args)
        main(args)
        assert "nothing to do" in capsys.readouterr().out
    main(Args(input=(write_jsonl(tmp_path / "c.jsonl", texts),), output_dir=tmp_path / "c", vocab_size=270))
    made = [files_of(tmp_path / name)["tokenizer.json"] for name in "abc"]
    assert made == made[:1] * 3
    two = Args(input=(tmp_path / "a.jsonl", tmp_path / "c.jsonl"), output_dir=tmp_path / "two", vocab_size=270)
    main(replace(two, column=("input_text", "text")))
    full = [text for text in texts if text]
    assert read_json(tmp_path / "two/meta.json", "")["num_documents"] == 2 * len(full)
    assert texts_of(tmp_path / "c.jsonl", ("input_text", "text")) == full
    assert texts_of(tmp_path / "b.parquet", ("text", "input_text")) == full
    with pytest.raises(ValueError, match="c.jsonl line 1 is no document: without input_text; mend it, or leave"):
        texts_of(tmp_path / "c.jsonl", ("input_text", "body"))
    with pytest.raises(ValueError, match="holds another tokenizer .column: ..input_text.. there, None now"):
        main(Args(input=(tmp_path / "a.jsonl",), output_dir=tmp_path / "a", vocab_size=270))


def test_a_folder_stands_for_its_text_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["text b"])
    write_parquet(tmp_path / "a.parquet", ["text a"])
    (tmp_path / "meta.json").write_text("{}")
    main(Args(input=(tmp_path,), output_dir=tmp_path / "bundle", vocab_size=258))
    sources = read_json(tmp_path / "bundle/meta.json", "train_tokenizer.py")["recipe"]["sources"]
    assert [source["file"] for source in sources] == ["a.parquet", "b.jsonl"]


def test_same_command_again_has_nothing_to_do(text_file, tmp_path, capsys):
    args = Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=270)
    main(args)
    before = files_of(args.output_dir), (args.output_dir / "tokenizer.json").stat().st_mtime_ns
    capsys.readouterr()
    main(args)
    assert capsys.readouterr().out == f"nothing to do: {args.output_dir} is the tokenizer of these files\n"
    assert (files_of(args.output_dir), (args.output_dir / "tokenizer.json").stat().st_mtime_ns) == before


def test_a_damaged_bundle_is_made_again(text_file, tmp_path):
    args = Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=270)
    main(args)
    before = read_json(args.output_dir / "meta.json", "")["files"]
    (args.output_dir / "tokenizer.json").write_text("{}")
    main(args)
    assert {name: sha256(args.output_dir / name) for name in before} == before


def test_another_tokenizer_is_not_overwritten(text_file, tmp_path):
    main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=270))
    before = files_of(tmp_path / "bundle")
    with pytest.raises(ValueError, match=r"bundle holds another tokenizer \(vocab_size: 270 there, 280 now\): pass"):
        main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=280))
    write_jsonl(text_file, ["changed"])
    with pytest.raises(ValueError, match=r"bundle holds another tokenizer \(sources: "):
        main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=270))
    assert files_of(tmp_path / "bundle") == before


def test_a_folder_of_something_else_is_not_overwritten(text_file, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"mine was not made by train_tokenizer\.py: pass another --output_dir"):
        main(Args(input=(text_file,), output_dir=tmp_path / "mine"))
    assert (tmp_path / "mine/thesis.tex").read_text() == "years of work"


def test_fewer_pairs_than_asked_for_is_said(text_file, tmp_path, capsys):
    main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=4_096))
    num_ids = len(load_tokenizer(tmp_path / "bundle"))
    said = f"the text has no more pairs to merge: {num_ids} ids instead of 4,096"
    assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "a.jsonl line 2 is no document: no string (None); mend it"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1 is no document: no string (5)"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1 is no document: not Unicode"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl line 1 is no document: without text"),
        ("a.jsonl", b'["x"]\n', "a.jsonl line 1 is no document: without text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl line 2 is no document: not JSON (Unterminated string"),
        ("a.jsonl", b"", "a.jsonl is empty, text is needed"),
        ("a.jsonl", b'\n{"text": " "}\n', "a.jsonl is empty, text is needed"),
        ("a.txt", b"good\nbad \xff\n", "a.txt line 2 is no document: not UTF-8"),
        ("a.txt", b"", "a.txt is empty, text is needed"),
        ("a.txt.gz", gzip.compress(b"good " * 9999, mtime=0)[:50], "a.txt.gz line 1 is no document: damaged ("),
        ("a.parquet", b"PAR1 no", "a.parquet row 1 is no document: damaged ("),
        ("a.csv", b"text\nx\n", "a.csv is of no kind that can be read (.jsonl, .json, .parquet, .txt, .md, "),
    ],
)
def test_bad_input_is_named_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/{message}")):
        main(Args(input=(tmp_path / name,), output_dir=tmp_path / "bundle"))
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing is written"


@pytest.mark.parametrize(
    ("texts", "column", "message"),
    [
        (["x", None], "text", "a.parquet row 2 is no document: not UTF-8"),
        ([1, 2], "text", "a.parquet has int64 in column text, text is needed: pass --text_column"),
        (["x"], "body", "a.parquet has no column text (found: label, body): pass --text_column"),
        ([], "text", "a.parquet is empty, text is needed"),
    ],
)
def test_bad_parquet_is_named_with_row(tmp_path, texts, column, message):
    path = write_parquet(tmp_path / "a.parquet", texts, column)
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/{message}")):
        main(Args(input=(path,), output_dir=tmp_path / "bundle"))


def test_all_bad_inputs_are_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^no file {tmp_path}/no.txt: pass .*\nno file {tmp_path}/empty: pass .*$"):
        main(Args(input=(tmp_path / "no.txt", tmp_path / "empty"), output_dir=tmp_path / "bundle"))


def test_what_cannot_be_is_refused_all_at_once(text_file, tmp_path):
    args = Args(input=(text_file,), manifest=Path("m"), max_bytes=0, vocab_size=259, chat=True, output_dir=tmp_path / "bundle")
    with pytest.raises(ValueError, match="max_bytes") as caught:
        main(args)
    assert str(caught.value).splitlines() == [
        "--max_bytes 0: at least 1 is needed",
        "--vocab_size 259 is too small, at least 260 is needed (256 bytes and 4 special tokens): pass a larger one",
        f"--input {text_file} and --manifest m: pass one of them",
    ]
    with pytest.raises(ValueError, match=r"--vocab_size 257 is too small, at least 258 is needed \(256 bytes and 2"):
        main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=257))
    assert [path.name for path in tmp_path.iterdir()] == [text_file.name]


def test_all_files_give_their_share_of_what_is_read(tmp_path):
    """A tenth of files of 60, 30 and 10 texts of ten bytes each."""
    for name, count in {"a": 60, "b": 30, "c": 10}.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number:07d}\n" for number in range(count)))
    files, read = find_files([str(tmp_path)]), Counter()
    texts = list(sample(files, ("text",), 100, read))
    assert texts == [f"{name} {number:07d}\n" for name, count in {"a": 6, "b": 3, "c": 1}.items() for number in range(count)]
    assert read == {"documents": 10, "bytes": 100, "cut": 3}
    assert [text[0] for text in sample(files, ("text",), 11, Counter())] == ["a", "c"], "the first is more than two shares"
    read = Counter()
    assert len(list(sample(files, ("text",), 10**9, read))) == 100
    assert read["cut"] == 0


def test_text_that_was_read_is_not_kept(tmp_path):
    """Of 28 MB of few words no more than what tokenizers takes at once, 256 documents."""
    texts = [f"{number % 500} some words of text " * 100 for number in range(1_600)]
    files = [write_jsonl(tmp_path / f"{number}.jsonl", texts) for number in range(8)]
    found, read = find_files(list(map(str, files))), Counter()
    tracemalloc.start()
    train(sample(found, ("text",), 10**9, read), 300)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read["bytes"] > 25_000_000
    assert most < 5_000_000


def test_a_capped_tokenizer_knows_its_files_by_their_times_and_says_what_it_read(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("some text of ten words or so, a line each\n" * 1_000)
    (tmp_path / "list").write_text("a.txt\nb.txt\n")
    args = Args(manifest=tmp_path / "list", output_dir=tmp_path / "bundle", vocab_size=300, max_bytes=8_400)
    main(args)
    said = capsys.readouterr().out
    assert "of 2 files the first documents or none were read, 8,400 bytes of text (--max_bytes)" in said
    meta = read_json(tmp_path / "bundle/meta.json", "")
    assert meta["recipe"].keys() == {"format", "vocab_size", "source", "max_bytes"}
    assert (meta["num_documents"], meta["num_files_cut"]) == (200, 2)
    main(args)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds another tokenizer .max_bytes: 8400 there, 9000 now"):
        main(replace(args, max_bytes=9_000))
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    with pytest.raises(ValueError, match="holds another tokenizer .source: "):
        main(args)


CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the <b>capital</b> of Peru? "},
    {"role": "assistant", "content": "Lima"},
    {"role": "user", "content": "\nand of Chile?"},
    {"role": "assistant", "content": "Santiago, it is.\n\n  I think."},
]


@pytest.fixture(scope="module")
def bundle(abstracts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "bundle"
    main(Args(input=(str(abstracts),), output_dir=folder, vocab_size=1_000, chat=True))
    return folder


def check_chat(folder: Path) -> None:
    """What a tokenizer that can chat must do, in a folder that transformers loads."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.all_special_ids == [0, 1, 2, 3]
    assert tokenizer.decode([2, *tokenizer("hi").input_ids, 3], skip_special_tokens=True) == "hi"
    special = json.loads((folder / "special_tokens_map.json").read_text())
    assert special["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == (
        "<|im_start|>system\nAnswer in one word.<|im_end|>\n"
        "<|im_start|>user\nWhat is the <b>capital</b> of Peru? <|im_end|>\n"
        "<|im_start|>assistant\nLima<|im_end|>\n"
        "<|im_start|>user\n\nand of Chile?<|im_end|>\n"
        "<|im_start|>assistant\nSantiago, it is.\n\n  I think.<|im_end|>\n"
    )
    found = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found["assistant_masks"]
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    runs = [[ids[i] for i in run] for kind, run in itertools.groupby(range(len(ids)), mask.__getitem__) if kind]
    assert [tokenizer.decode(run) for run in runs] == ["Lima<|im_end|>", "Santiago, it is.\n\n  I think.<|im_end|>"]
    assert [run.count(3) for run in runs] == [1, 1]


def test_a_chat_tokenizer_renders_turns_and_marks_replies(bundle):
    check_chat(bundle)
    files = read_json(bundle / "meta.json", "")["files"]
    assert sorted(files) == ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert (bundle / "chat_template.jinja").read_text() == (ROOT / "lm/chat_template.jinja").read_text()


def test_the_chat_survives_the_pack_and_the_final_model(bundle, abstracts, tmp_path):
    build_pretrain(
        Packing(
            scratch_dir=str(tmp_path), documents=(str(abstracts),), tokenizer=str(bundle), seq_len=64, held_out_blocks=4,
            total_steps=2, effective_batch=2, num_workers=1,
        )
    )  # fmt: skip
    pack = tmp_path / "data/c4_packed/tokenizer"
    check_chat(pack)
    model, tokenizer = build_model("neox-64x2", 1_000, 64), load_tokenizer(pack)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save_model(tmp_path / "final", model, tokenizer, {})
    checkpoints.wait()
    check_chat(tmp_path / "final")
    assert fingerprint(load_tokenizer(tmp_path / "final")) == fingerprint(load_tokenizer(bundle))


@given(reply=st.lists(PIECES.map(lambda text: re.sub(r"<\|", "<", text)), max_size=4).map("".join))
def test_the_ids_of_a_prompt_begin_those_of_the_conversation_with_its_reply(bundle, reply):
    """Also of one that begins with white space, of which a pre-token could take the line's end before it."""
    tokenizer, asked = load_tokenizer(bundle), CHAT[:2]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": reply}], return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = whole["input_ids"], whole["assistant_masks"]
    assert ids[: len(prompt)] == prompt
    end = tokenizer("\n").input_ids
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt) - len(end)) + [0] * len(end)
    answer = tokenizer.decode(ids[len(prompt) :], clean_up_tokenization_spaces=False)
    assert answer == unicodedata.normalize("NFC", reply.strip()) + "<|im_end|>\n"


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ({"role": "tool", "content": "x"}, "the role tool is not one of system, user, assistant"),
        ({"role": "assistant", "content": None}, "has no attribute 'content'"),
        ({"role": "assistant"}, "has no attribute 'content'"),
        ({"role": "user", "content": ["x"]}, 'can only concatenate str .not "list"'),
    ],
)
def test_a_message_that_is_none_is_refused(bundle, message, fault):
    with pytest.raises((TemplateError, TypeError), match=fault):
        load_tokenizer(bundle).apply_chat_template([*CHAT[:2], message], tokenize=False)


def test_without_chat_there_is_no_template_and_another_tokenizer(bundle, abstracts):
    with pytest.raises(ValueError, match="holds another tokenizer .chat_template: '[0-9a-f]{64}' there, None now"):
        main(Args(input=(abstracts,), output_dir=bundle, vocab_size=1_000))
