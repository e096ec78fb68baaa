"""Packs of characters: the vocabulary is a constant, what is packed is what was written, and no other vocabulary reads it."""

import string
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator
from damage import change_meta, list_again
from hypothesis import given
from hypothesis import strategies as st
from packs import pretrain_here
from test_build_pretrain import content, inline
from test_documents import compress, jsonl
from text import byte_level_bpe, documents
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from unidecode import unidecode

import lm.piece_packer
import lm.records
import pretrain
from build_pretrain import Args, main
from lm.characters import CHARACTERS, END, PREPARE, CharacterTable, character_tokenizer, preparation, prepare_text, simplify
from lm.graph_tokens import check_tokenizer
from lm.shards import Pack
from lm.text_encoder import TextEncoder
from lm.tokenizer import encode_documents, fingerprint, load_tokenizer, save_tokenizer

# The vocabulary of the journal, written out: a pack of today is read in ten years.
VOCABULARY = "\t\n\x0b\x0c\r !\"#$%&'()*+,-./0123456789:;<=>?@[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~\N{EN DASH}"
TEXTS = [f"{number} Ünïcode — “Text” {text}\x00" for number, text in enumerate(documents()[:60])]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("characters")
    character_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def args(tmp_path, monkeypatch) -> Args:
    """A corpus in two files, packed as characters in this process, in shards of about 10,000."""
    inline(monkeypatch)
    monkeypatch.setattr(lm.piece_packer, "BATCH_DOCUMENTS", 4)
    for number, name in enumerate(("a.jsonl", "b.json.gz")):
        path, texts = tmp_path / "corpus" / name, TEXTS[number::2]
        path.parent.mkdir(exist_ok=True)
        compress(path, jsonl(texts)) if path.suffix == ".gz" else path.write_bytes(jsonl(texts))
    return Args(
        scratch_dir=str(tmp_path / "S"),
        documents=(str(tmp_path / "corpus"),),
        tokenizer="char",
        seq_len=64,
        no_overlap=True,
        blocks_per_shard=150,
        held_out_blocks=20,
        num_workers=1,
        shuffle_window=0,
    )


def in_another_order(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of the same characters, the ids of two of them exchanged, written into `folder`."""
    text = character_tokenizer().backend_tokenizer.to_str()
    swapped = text.replace('"a":45', '"?":45').replace('"b":46', '"a":46').replace('"?":45', '"b":45')
    backend = Tokenizer.from_str(swapped)
    others = {"clean_up_tokenization_spaces": False, "prepare": PREPARE}
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, **others)
    other.save_pretrained(folder)
    assert (other.convert_tokens_to_ids(["a", "b"]), len(other)) == ([46, 45], 76)
    return other


def test_the_vocabulary_is_that_of_the_journal_and_a_constant():
    assert CHARACTERS == VOCABULARY
    assert len(CHARACTERS) == 75
    assert character_tokenizer().get_vocab() == {END: 0} | {character: i for i, character in enumerate(VOCABULARY, 1)}
    assert fingerprint(character_tokenizer()) == "123e7f349e6295a5053b31a6315749d50e4832e476a48f9db81ee980481ee99c"


def test_every_code_point_becomes_what_unidecode_and_lower_case_make_of_it():
    """But for control characters that string.printable has not, which are dropped."""
    dropped = set()
    for code_point in (*range(0xD800), *range(0xE000, 0x10100), *range(0x1D400, 0x1D800), *range(0x1F000, 0x1FB00)):
        plain = unidecode(chr(code_point)).lower()
        found = simplify(f"<{chr(code_point)}>")[1:-1]
        if found != plain:
            dropped |= set(plain)
            assert found == "".join(character for character in plain if character in VOCABULARY)
    assert dropped == set(map(chr, range(128))) - set(string.printable)
    assert simplify("“Naïve” CAFÉ \N{EN DASH}\x00 北京\t\r\n") == '"naive" cafe - bei jing \t\r\n'


@given(st.text(VOCABULARY))
def test_decoding_gives_the_characters_back_and_adds_none(text):
    tokenizer = character_tokenizer()
    ids = tokenizer(text).input_ids
    assert (len(ids), tokenizer.decode(ids)) == (len(text), text)


def test_a_saved_tokenizer_is_the_same_and_still_asks_for_prepared_text(tokenizer_dir, tmp_path):
    save_tokenizer(load_tokenizer(tokenizer_dir), tmp_path / "again")
    text = "hello , world !  don 't\n\n\tx \N{EN DASH} <|endofte"
    for found in (AutoTokenizer.from_pretrained(tmp_path / "again"), load_tokenizer(tmp_path / "again")):
        assert fingerprint(found) == fingerprint(character_tokenizer())
        assert (found.decode(found(text).input_ids), found.decode([45, 0, 46])) == (text, "a<|endoftext|>b")
        assert (found.eos_token_id, preparation(found)) == (0, PREPARE)
        assert prepare_text(found, "Hélas") == "helas"
    assert prepare_text(byte_level_bpe(), "Hélas") == "Hélas"


def test_a_tokenizer_that_needs_another_unidecode_is_refused():
    other = character_tokenizer()
    other.init_kwargs["prepare"] = "unidecode 0.4.1, lower case"
    with pytest.raises(ValueError, match=r"prepared by 'unidecode 0.4.1, lower case', here that is 'unidecode 1.4.0, lower"):
        prepare_text(other, "Hélas")


@given(st.lists(st.text(VOCABULARY)))
def test_the_table_gives_the_ids_of_the_reference(texts):
    encoder = TextEncoder(character_tokenizer().backend_tokenizer.to_str())
    assert (encoder.name, encoder.why_not_fast) == ("a table of characters", None)
    encoded = encoder.encode(texts, range(len(texts)))
    assert (encoded.num_compared, encoded.differing) == (len(texts), [])
    expected = encode_documents(character_tokenizer(), texts)
    assert encoded.ids.tolist() == [number for ids in expected for number in ids.tolist()]
    assert [*encoded.ends] == [sum(map(len, texts[: i + 1])) for i in range(len(texts))]


@pytest.mark.parametrize("character", ["A", "\0", "é", "\u2014", "\U0001f642"])
def test_a_character_that_is_no_token_is_an_error_and_never_an_unknown_token(character):
    tokenizer = character_tokenizer()
    with pytest.raises(ValueError, match="is none of the 75 characters that are tokens: prepare the text first"):
        CharacterTable().encode(["text", f"te{character}xt"])
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer(character)


def test_a_tokenizer_of_the_same_characters_in_another_order_is_not_looked_up_in_the_table(tmp_path):
    other = in_another_order(tmp_path)
    encoder = TextEncoder(other.backend_tokenizer.to_str())
    assert encoder.why_not_fast.startswith("gigatoken does not load it (")
    assert encoder.encode(["ab"]).ids.tolist() == [46, 45]


def test_what_is_packed_is_the_prepared_text_of_every_document(args, capsys):
    (Path(args.documents[0]) / "c.jsonl").write_bytes(jsonl(["🙂\x00", "Last"]))
    main(args)
    pack, tokenizer = Pack(args.folder), AutoTokenizer.from_pretrained(args.folder / "tokenizer")
    ids = [number for entry in (pack.held_out, *pack.shards) for number in pack._tokens(entry)]
    expected = [unidecode(text).lower().replace("\x00", "") + END for text in TEXTS[::2] + TEXTS[1::2] + ["Last"]]
    assert tokenizer.decode(ids) == "".join(expected)
    assert pack.header["reading"]["prepare"] == "unidecode 1.4.0, lower case"
    assert (pack.header["vocab_size"], pack.header["eos_token_id"]) == (76, 0)
    said = capsys.readouterr().out
    assert "left out: 1 documents, empty" in said
    assert "encoded by a table of characters; " in said


def test_a_pack_of_characters_is_not_read_with_another_vocabulary(args):
    """A tokenisation that is read with another vocabulary is garbage, and nothing shows it but the loss."""
    main(args)
    read = replace(pretrain.parse(pretrain.Args, ["--scratch_dir=S", "--total_steps=1"]), c4_dir=str(args.folder))
    assert pretrain.read_pack(read, Accelerator(cpu=True))[1].get_vocab() == character_tokenizer().get_vocab()
    in_another_order(args.folder / "tokenizer")
    with pytest.raises(ValueError, match="tokenizer.json has SHA-256"):
        pretrain.read_pack(read, Accelerator(cpu=True))
    list_again(args.folder, *(f"tokenizer/{path.name}" for path in (args.folder / "tokenizer").iterdir()))
    with pytest.raises(ValueError, match="tokenizer did not make its shards: remove the folder and run build_pretrain.py"):
        pretrain.read_pack(read, Accelerator(cpu=True))


def test_a_pack_begun_with_one_vocabulary_is_not_continued_with_another(args, tmp_path):
    some = replace(args, total_steps=1)
    main(some)
    before = content(some.folder)
    in_another_order(tmp_path / "other")
    byte_level_bpe().save_pretrained(tmp_path / "bpe")
    for other, differs in (("other", "tokenizer.fingerprint: there"), ("bpe", "reading.prepare: there .*, asked None")):
        with pytest.raises(ValueError, match=rf"holds other data \(.*{differs}"):
            main(replace(args, tokenizer=str(tmp_path / other)))
    with pytest.raises(ValueError, match=r"holds other data \(overlap: there False, asked None\)"):
        main(replace(args, no_overlap=False))
    assert content(some.folder) == before
    main(replace(args, tokenizer=str(some.folder / "tokenizer")))  # the same, by another name
    assert Pack(args.folder).num_tokens > Pack(args.folder).shards[0]["tokens"]


def test_nothing_is_tokenised_twice(args, monkeypatch, capsys):
    """A second call opens no text and encodes nothing."""
    main(args)
    before = content(args.folder)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(lm.records, "open_stream", never)
    monkeypatch.setattr(TextEncoder, "encode", never)
    capsys.readouterr()
    main(args)
    assert capsys.readouterr().out.startswith(f"{args.folder} is finished, nothing to do\n")
    assert content(args.folder) == before
    with pytest.raises(AssertionError):
        main(replace(args, output_dir=f"{args.folder}_2"))


def test_a_run_on_characters_ends_with_their_tokenizer(args, tmp_path):
    main(args)
    options = {"total_steps": 2, "mixin_percent": 0.0, "pptrain_checkpoint": "none", "model": "neox-64x2"}
    assert pretrain_here(tmp_path / "run", Path(args.scratch_dir), **options) == 0
    final = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert fingerprint(final) == fingerprint(character_tokenizer())
    assert final.decode(final(prepare_text(final, "Où ?\n")).input_ids) == "ou ?\n"


def test_graphs_are_not_told_in_characters():
    with pytest.raises(ValueError, match="texts prepared by 'unidecode 1.4.0, lower case', which would change the names"):
        check_tokenizer(character_tokenizer())


def test_an_older_pack_is_the_same_pack(args, tokenizer_dir):
    """What is not asked for is not in the header, so that its identity, which runs know, stays."""
    byte_level_bpe().save_pretrained(args.scratch_dir)
    main(replace(args, no_overlap=False, tokenizer=args.scratch_dir, total_steps=1))
    header = Pack(args.folder).header
    reading = {"text_column": "text", "text_unit": "file", "seed": 0, "shuffle_window": 0}
    assert (header["reading"], "overlap" in header) == (reading, False)
    change_meta(args.folder, lambda meta: meta["header"].update(overlap=True))
    with pytest.raises(ValueError, match="has overlap True, false is needed, or no such key"):
        Pack(args.folder)
