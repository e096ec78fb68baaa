"""train_tokenizer.py: the same text gives the same tokenizer, no text is lost in it, and bad text is named."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lm.files import read_json, sha256
from lm.tokenizer import encode_documents, fingerprint, load_tokenizer
from train_tokenizer import Args, bytes_per_token, main, read_texts, train

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
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{tmp_path}/bundle: 2,000 ids from 1,000 documents, {meta['bytes_per_token']} bytes per token"
    )


def test_it_splits_text_as_neox_does(abstracts, neox_tokenizer_dir):
    ours = train([abstracts], 300, Counter()).backend_tokenizer
    neox = load_tokenizer(neox_tokenizer_dir).backend_tokenizer
    for part in ("normalizer", "pre_tokenizer"):
        assert json.loads(ours.to_str())[part] == json.loads(neox.to_str())[part]
    assert ours.pre_tokenizer.pre_tokenize_str("a b 12, c") == neox.pre_tokenizer.pre_tokenize_str("a b 12, c")


def test_every_text_comes_back_from_its_ids(text_file):
    tokenizer = train([write_jsonl(text_file.with_name("few.jsonl"), ["only plain words"])], 258, Counter())
    assert [tokenizer.decode(ids) for ids in encode_documents(tokenizer, HARD_TEXTS)] == HARD_TEXTS


def test_text_outside_nfc_comes_back_in_nfc(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["cafe\u0301 \u212b"])
    tokenizer = train([path], 258, Counter())
    (ids,) = encode_documents(tokenizer, ["cafe\u0301 \u212b"])
    assert tokenizer.decode(ids) == "café Å"
    assert bytes_per_token(tokenizer, [path]) == 1.0


def test_a_tokenizer_that_loses_text_is_not_published(text_file):
    tokenizer = train([text_file], 258, Counter())
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    with pytest.raises(RuntimeError, match="does not come back from its ids: 'the cat"):
        bytes_per_token(tokenizer, [text_file])


def test_same_text_gives_the_same_files_in_another_process(abstracts, tmp_path):
    for name, seed in (("a", "1"), ("b", "2")):
        command = [sys.executable, ROOT / "train_tokenizer.py", "--input", abstracts, "--vocab_size", "600"]
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": "true"}
        subprocess.run([*command, "--output_dir", tmp_path / name], cwd=ROOT, check=True, env=environment)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_jsonl_parquet_and_text_files_hold_the_same_documents(tmp_path):
    texts = ["one\ntwo", "three", "vier €"] * 100
    assert list(read_texts(write_jsonl(tmp_path / "a.jsonl", texts))) == texts
    assert list(read_texts(write_parquet(tmp_path / "a.parquet", texts))) == texts
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo\nvier €".encode())
    assert list(read_texts(tmp_path / "a.txt")) == ["one\r\n", "\n", "two\n", "vier €"]


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
    assert read_json(tmp_path / "two/meta.json", "")["num_documents"] == 2 * len(texts)
    assert list(read_texts(tmp_path / "c.jsonl", ("input_text", "text"))) == texts
    with pytest.raises(ValueError, match='c.jsonl line 1 is .*, an object with "input_text" or "body" is needed'):
        list(read_texts(tmp_path / "c.jsonl", ("input_text", "body")))
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
    before = files_of(args.output_dir)
    (args.output_dir / "tokenizer.json").write_text("{}")
    main(args)
    assert files_of(args.output_dir) == before


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
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "a.jsonl line 2 is None, a string is needed"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl line 1 is 5, a string is needed"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1 is not Unicode ("),
        ("a.jsonl", b'{"body": "x"}\n', 'a.jsonl line 1 is b\'{"body": "x"}\\n\', an object with "text" is needed'),
        ("a.jsonl", b'["x"]\n', 'a.jsonl line 1 is b\'["x"]\\n\', an object with "text" is needed'),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', "a.jsonl line 2 is not JSON (Unterminated string"),
        ("a.jsonl", b"", "a.jsonl is empty, text is needed"),
        ("a.txt", b"good\nbad \xff\n", "a.txt line 2 is not UTF-8 ("),
        ("a.txt", b"", "a.txt is empty, text is needed"),
        ("a.parquet", b"PAR1 no", "a.parquet is not a parquet file ("),
        ("a.csv", b"text\nx\n", "a.csv ends in '.csv', one of .jsonl, .parquet, .txt is needed"),
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
        (["x", None], "text", "a.parquet row 2 is None, a string is needed"),
        ([1, 2], "text", "a.parquet row 1 is 1, a string is needed"),
        (["x"], "body", "a.parquet has columns ['label', 'body'], \"text\" is needed"),
        ([], "text", "a.parquet is empty, text is needed"),
    ],
)
def test_bad_parquet_is_named_with_row(tmp_path, texts, column, message):
    path = write_parquet(tmp_path / "a.parquet", texts, column)
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/{message}")):
        main(Args(input=(path,), output_dir=tmp_path / "bundle"))


def test_all_bad_inputs_are_named_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    faults = [
        f"no {tmp_path}/no.txt: pass --input existing files, for real text to start with run fetch_samples.py",
        f"{tmp_path}/empty holds no .jsonl, .parquet, .txt file: pass --input another folder, or files",
    ]
    with pytest.raises(ValueError, match="^" + re.escape("\n".join(faults)) + "$"):
        main(Args(input=(tmp_path / "no.txt", tmp_path / "empty"), output_dir=tmp_path / "bundle"))


def test_a_vocabulary_without_room_for_every_byte_is_refused(text_file, tmp_path):
    with pytest.raises(ValueError, match=r"--vocab_size 257 is too small, at least 258 is needed \(256 bytes and 2"):
        main(Args(input=(text_file,), output_dir=tmp_path / "bundle", vocab_size=257))
