"""build_pretrain.py: every token of every document once, in order, whoever packs and however often it is killed."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import change_meta, flip
from hub import hub
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import publish, write_tokens
from test_documents import compress, jsonl
from text import byte_level_bpe, documents

import lm.documents
import lm.packer
import lm.piece_packer
import lm.shards
from build_pretrain import Args, main
from lm.corpus import find_files
from lm.documents import cut
from lm.documents import documents as read
from lm.files import read_json, read_sealed, sha256
from lm.mixed_rows import MixedRows
from lm.shards import Pack, totals
from lm.tokenizer import encode_documents
from lm.workers import CONTEXT

ROOT = Path(__file__).parents[1]
TEXTS = [f"{number} {text}" for number, text in enumerate(documents())]
TOKENIZER = byte_level_bpe()


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_bpe(512).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """All documents in eight files of different formats."""
    folder = tmp_path_factory.mktemp("corpus")
    names = ["0.jsonl", "1.jsonl.gz", "2.parquet", "3.json.zst", "4.jsonl", "5.jsonl.gz", "6.parquet", "7.jsonl"]
    for number, name in enumerate(names):
        texts = TEXTS[number::8]
        if name.endswith("parquet"):
            pq.write_table(pa.table({"text": texts}), folder / name, row_group_size=5)
        elif name.endswith(("gz", "zst")):
            compress(folder / name, jsonl(texts))
        else:
            (folder / name).write_bytes(jsonl(texts))
    return folder


@pytest.fixture
def args(tmp_path, corpus, tokenizer_dir) -> Args:
    """All of the corpus in shards of about 6,400 tokens."""
    return Args(
        scratch_dir=str(tmp_path / "S"),
        documents=(str(corpus),),
        tokenizer=tokenizer_dir,
        seq_len=64,
        blocks_per_shard=100,
        held_out_blocks=20,
        num_workers=2,
        shuffle_window=5,
    )


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of a file each, and batches of 4 documents, in this process; workers are started by `inline`."""
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(lm.piece_packer, "BATCH_DOCUMENTS", 4)
    inline(monkeypatch)


def inline(monkeypatch):
    """Let the packer's workers run in this process, so that what a test changes holds for them."""
    import lm.packer

    class Here:
        def __init__(self, start, arguments):
            start(*arguments)

        def submit(self, call, *arguments):
            from concurrent.futures import Future

            future = Future()
            try:
                future.set_result(call(*arguments))
            except BaseException as error:
                future.set_exception(error)
            return future

    from contextlib import contextmanager

    @contextmanager
    def worker_pool(_num_workers, _flag, _preload, start, arguments):
        yield Here(start, arguments)

    monkeypatch.setattr(lm.packer, "worker_pool", worker_pool)


def stream_of(args: Args, held_out_tokens: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What the pack must hold, in the plainest way: held-out tokens and the tokens of the stream."""
    from build_pretrain import reading_of
    from lm.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    reading = reading_of(args, tokenizer)
    pieces = cut(find_files(args.documents), reading)
    texts = [document.text for number, piece in enumerate(pieces) for document in read(piece, number, reading)]
    ids = [[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, texts)]
    ends = np.cumsum([len(document) for document in ids])
    held_out = int(np.searchsorted(ends, held_out_tokens or args.held_out_blocks * args.seq_len + 1)) + 1
    return tuple(np.array(list(chain.from_iterable(part)), np.uint16) for part in (ids[:held_out], ids[held_out:]))


def content(folder: Path) -> dict[str, str]:
    """Every file of a pack with its checksum, but for the locks."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def test_every_token_of_every_document_is_packed_once_in_order(args, small_pieces):
    main(args)
    held_out, stream = stream_of(args)
    pack = Pack(args.folder)
    assert pack.finished
    assert len(pack.shards) > 10
    packed = np.concatenate([np.fromfile(args.folder / shard["file"], "<u2") for shard in pack.shards])
    np.testing.assert_array_equal(packed, stream)
    np.testing.assert_array_equal(np.fromfile(args.folder / "held_out.bin", "<u2"), held_out)
    meta = read_json(args.folder / "meta.json", "")
    assert meta["num_tokens"] == len(stream)
    assert meta["num_documents"] + meta["held_out"]["documents"] == len(TEXTS)
    assert meta["num_blocks"] == (len(stream) - 1) // 64 == pack.num_blocks
    assert meta["tokens_after_the_last_block"] == (len(stream) - 1) % 64
    assert (meta["left_out"], meta["num_differing"]) == ({}, 0)


def test_every_token_but_the_first_is_a_target_exactly_once(args, small_pieces):
    main(args)
    pack, stream = Pack(args.folder), stream_of(args)[1]
    blocks = pack.blocks(range(pack.num_blocks))
    assert blocks.shape == (pack.num_blocks, 65)
    np.testing.assert_array_equal(blocks[:, 1:].flatten(), stream[1 : 1 + pack.num_blocks * 64])
    np.testing.assert_array_equal(blocks[1:, 0], blocks[:-1, -1])
    order = np.random.default_rng(0).permutation(pack.num_blocks)
    np.testing.assert_array_equal(Pack(args.folder).blocks(order), blocks[order])
    ends = np.cumsum([shard["tokens"] for shard in pack.shards])
    assert any(end % 64 > 1 for end in ends[:-1])  # blocks do lie across shards
    first = next(number for number in range(pack.num_blocks) if number * 64 >= ends[0])
    assert pack.where(first) == f"shard_00001.bin token {first * 64 - ends[0]}"
    assert pack.where(0) == "shard_00000.bin token 0"


def test_without_overlap_every_block_is_whole_and_no_token_is_in_two(args, small_pieces, capsys):
    some = replace(args, no_overlap=True, total_steps=50, effective_batch=8)
    main(some)
    assert "blocks of 64 + 1 that do not overlap in " in capsys.readouterr().out
    assert 400 <= Pack(args.folder).num_blocks < 600
    main(replace(args, no_overlap=True))
    pack, stream = Pack(args.folder), stream_of(args, 20 * 65)[1]
    meta = read_json(args.folder / "meta.json", "")
    assert meta["num_blocks"] == pack.num_blocks == len(stream) // 65
    assert meta["tokens_after_the_last_block"] == len(stream) % 65
    np.testing.assert_array_equal(pack.blocks(range(pack.num_blocks)).flatten(), stream[: pack.num_blocks * 65])
    assert len(pack.held_out_blocks()) == pack.held_out["tokens"] // 65 >= 20
    with pytest.raises(ValueError, match=r"holds other data \(overlap: there False, asked None\)"):
        main(args)


def test_without_overlap_shards_and_held_out_text_hold_as_many_blocks_as_were_asked_for(args, small_pieces, tmp_path):
    """The first document and the first batch would be enough if blocks overlapped."""
    main(replace(args, seq_len=8, held_out_blocks=1, blocks_per_shard=1))
    first = Pack(args.folder)
    held_out, shard = (first.held_out["tokens"] - 1) // 8, first.shards[0]["tokens"] // 8
    other = {"held_out_blocks": held_out, "blocks_per_shard": shard, "output_dir": str(tmp_path / "other")}
    main(replace(args, seq_len=8, no_overlap=True, **other))
    pack = Pack(tmp_path / "other")
    assert len(pack.held_out_blocks()) >= held_out
    assert all(entry["tokens"] // 9 >= shard for entry in pack.shards if not entry["last"])


LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=6)


@settings(deadline=None)
@given(shards=LENGTHS, seq_len=st.integers(1, 40), held_out=st.integers(0, 90), overlap=st.booleans())
def test_blocks_of_any_length_over_shards_of_any_length(shards, seq_len, held_out, overlap):
    """Tokens are 0, 1, 2, ...; what blocks must hold is said in the plainest way."""
    step, header = (seq_len, {}) if overlap else (seq_len + 1, {"overlap": False})

    def expected(tokens: int) -> list[list[int]]:
        return [[*range(start, start + seq_len + 1)] for start in range(0, max(tokens - seq_len, 0), step)]

    with TemporaryDirectory() as folder:
        parts = np.split(np.arange(sum(shards), dtype=np.uint16), np.cumsum(shards[:-1]))
        whole = write_tokens(
            Path(folder) / "whole", TOKENIZER, parts, np.arange(held_out, dtype="u2"), seq_len=seq_len, **header
        )
        pack = Pack(whole)
        assert pack.blocks(range(pack.num_blocks)).tolist() == expected(sum(shards))
        assert pack.held_out_blocks().tolist() == expected(held_out)
        meta = read_json(whole / "meta.json", "")
        ends = [block[-1] + 1 for block in expected(sum(shards))]
        assert (meta["num_blocks"], meta["tokens_after_the_last_block"]) == (len(ends), sum(shards) - max(ends, default=0))
        for number in range(pack.num_blocks):
            name, _, token = pack.where(number).split()
            assert np.fromfile(whole / name, "<u2")[int(token)] == number * step
        publish(whole, Path(folder) / "growing", 1)
        growing = Pack(Path(folder) / "growing")
        assert growing.num_blocks == len(expected(shards[0]))
        publish(whole, growing.folder, len(shards), finished=True)
        growing.refresh()
        assert growing.blocks(range(growing.num_blocks)).tolist() == expected(sum(shards))


def test_without_overlap_every_token_of_the_blocks_is_read_once_an_epoch(tmp_path):
    parts = [np.arange(start, stop, dtype=np.uint16) for start, stop in ((0, 33), (33, 34), (34, 94))]
    folder = write_tokens(tmp_path / "pack", TOKENIZER, parts, parts[0], seq_len=8, overlap=False)
    rows = MixedRows(Pack(folder), [], TOKENIZER, seed=0, share=0.0)
    for epoch in range(3):
        batch = rows.rows(range(epoch * 10, epoch * 10 + 10), pass_blocks=10)
        read = np.concatenate([batch["input_ids"][:, :1], batch["targets"]], axis=1)
        assert sorted(read.flatten().tolist()) == list(range(90))


def test_blocks_longer_than_shards_are_read(args, small_pieces):
    main(replace(args, blocks_per_shard=1, held_out_blocks=1))
    pack = Pack(args.folder)
    pack.seq_len = pack.stride = 8000
    stream = np.concatenate([np.fromfile(pack.folder / shard["file"], "<u2") for shard in pack.shards])
    assert len(pack.shards) > pack.num_tokens // 8000
    np.testing.assert_array_equal(pack.blocks([0, 3, 7]), [stream[n * 8000 : n * 8000 + 8001] for n in (0, 3, 7)])


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_bytes_are_the_same_for_any_number_of_workers_and_tasks(args, tmp_path, num_workers, monkeypatch):
    """Real processes; the pieces are whole files here."""
    monkeypatch.setattr(lm.documents, "PIECE_BYTES", 20_000)  # this process cuts, the workers are told the pieces
    main(args)
    other = replace(args, output_dir=str(tmp_path / "other"), num_workers=num_workers)
    main(other)
    assert content(other.folder) == content(args.folder)
    shared = replace(args, output_dir=str(tmp_path / "shared"), num_workers=1)
    for task in (2, 0, 1):
        main(replace(shared, task=task, num_tasks=3))
    assert not (shared.folder / "meta.json").exists()
    main(replace(shared, join=True))
    assert content(shared.folder) == content(args.folder)


def test_a_join_without_all_tasks_names_what_is_missing_and_loses_nothing(args, small_pieces, tmp_path):
    for task in (0, 2):
        main(replace(args, task=task, num_tasks=3))
    count = len(cut(find_files(args.documents), lm.documents.Reading(shuffle_window=5)))
    missing = ", ".join(map(str, range(1, count, 3)))
    with pytest.raises(RuntimeError, match=rf"lacks pieces {missing}.*: run the tasks again, all with the same --num_tasks"):
        main(replace(args, join=True))
    main(replace(args, task=1, num_tasks=3))
    main(replace(args, join=True))
    other = replace(args, output_dir=str(tmp_path / "other"))
    main(other)
    assert content(args.folder) == content(other.folder)


def test_it_packs_what_the_steps_need_and_more_when_more_is_asked(args, small_pieces, tmp_path, capsys):
    some = replace(args, total_steps=50, effective_batch=8)
    main(some)
    pack = Pack(some.folder)
    assert 400 <= pack.num_blocks < 600
    assert pack.target_blocks == 400
    identity, first = pack.identity, content(some.folder)
    main(some)
    assert "is finished, nothing to do" in capsys.readouterr().out
    assert content(some.folder) == first
    main(replace(some, total_steps=100))
    longer = Pack(some.folder)
    assert longer.num_blocks >= 800
    assert longer.identity == identity
    assert {name: digest for name, digest in content(some.folder).items() if name.startswith("shard")}.items() >= {
        name: digest for name, digest in first.items() if name.startswith("shard")
    }.items()
    main(args)
    whole = replace(args, output_dir=str(tmp_path / "whole"))
    main(whole)
    assert content(args.folder) == content(whole.folder)


def test_a_pack_that_is_made_longer_is_unfinished_until_it_is(args, small_pieces, monkeypatch):
    from lm.packer import Packer

    main(replace(args, total_steps=50, effective_batch=8))
    run, seen = Packer.run, []

    def watch(self, *arguments, **others):
        pack = Pack(args.folder)
        seen.append((pack.finished, pack.target_blocks, pack.num_blocks >= 400))
        run(self, *arguments, **others)

    monkeypatch.setattr(Packer, "run", watch)
    main(replace(args, total_steps=100, effective_batch=8))
    assert seen == [(False, 800, True)]
    assert (Pack(args.folder).finished, Pack(args.folder).target_blocks) == (True, 800)


def test_asked_for_more_than_there_is_it_packs_all_and_says_so(args, small_pieces, capsys):
    main(replace(args, total_steps=10**6, effective_batch=32))
    assert "warning: that is all the text there is, 32,000,000 blocks were asked for" in capsys.readouterr().out
    np.testing.assert_array_equal(len(stream_of(args)[1]), Pack(args.folder).num_tokens)


def command(args: Args, **environment: str) -> list[str]:
    defaults = Args(scratch_dir="")
    options = []
    for name, value in vars(args).items():
        if value != getattr(defaults, name):
            options += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return [sys.executable, str(ROOT / "build_pretrain.py"), *options]


@pytest.mark.slow
def test_killed_at_any_moment_it_continues_and_ends_with_the_same_bytes(tmp_path, tokenizer_dir):
    (tmp_path / "source.jsonl").write_bytes(jsonl(TEXTS) * 250)  # 137 MB: three pieces of many shards
    args = Args(
        scratch_dir=str(tmp_path / "S"),
        documents=(str(tmp_path / "source.jsonl"),),
        tokenizer=tokenizer_dir,
        seq_len=256,
        blocks_per_shard=400,
        held_out_blocks=4,
        num_workers=2,
    )
    whole = replace(args, output_dir=str(tmp_path / "whole"))
    assert subprocess.run(command(whole), capture_output=True).returncode == 0
    draw, seen = random.Random(1), []
    for _ in range(5):
        process = subprocess.Popen(command(args), stdout=subprocess.DEVNULL, start_new_session=True)
        before = packed_shards(args.folder)
        while process.poll() is None and packed_shards(args.folder) <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)  # the packer alone: its workers must not outlive it
        process.wait()
        seen.append(packed_shards(args.folder))
    assert seen == sorted(set(seen)), seen
    assert not (args.folder / "meta.json").exists()
    assert subprocess.run(command(args), capture_output=True).returncode == 0
    assert content(args.folder) == content(whole.folder)


def test_killed_between_any_two_files_it_continues(args, small_pieces, tmp_path, monkeypatch):
    """The packer alone, killed before and after each of its own changes to the folder: held-out text, moves, records."""
    import build_pretrain
    import lm.packer

    class Killed(BaseException):
        pass

    whole = replace(args, output_dir=str(tmp_path / "whole"))
    main(whole)
    places = [(build_pretrain, "write_held_out"), (lm.packer, "write_sealed")]
    places += [(lm.packer.os, "replace"), (lm.packer.Packer, "_tidy")]
    for module, name in places:
        for count in (1, 2, 9):
            for after in (False, True):
                calls, real = [0], getattr(module, name)

                def kill(*arguments, real=real, calls=calls, count=count, after=after):
                    calls[0] += 1
                    done = real(*arguments) if calls[0] != count or after else None
                    if calls[0] == count:
                        raise Killed
                    return done

                killed = replace(args, output_dir=str(tmp_path / f"{name}{count}{after}"))
                with monkeypatch.context() as patch:
                    patch.setattr(module, name, kill)
                    try:
                        main(killed)
                    except Killed:
                        assert calls[0] == count
                main(killed)
                assert content(killed.folder) == content(whole.folder), (name, count, after)


def packed_shards(folder: Path) -> int:
    published = read_json(folder / "progress.json", "")["shards"] if (folder / "progress.json").exists() else []
    known = {(shard["piece"], shard["records"][0]) for shard in published}
    for path in (folder / "partial").glob("*/*.json"):
        known.add((int(path.parent.name), read_json(path, "")["shard"]["records"][0]))
    return len(known)


def test_shards_are_published_in_order_and_can_be_read_before_the_end(args, monkeypatch, small_pieces):
    seen, stream = [], stream_of(args)[1]
    from lm.packer import Packer

    publish = Packer.publish

    def watch(self):
        publish(self)
        pack = Pack(args.folder)
        if not pack.finished and pack.num_blocks:
            np.testing.assert_array_equal(pack.blocks([pack.num_blocks - 1])[0][1:], stream[1:][: pack.num_blocks * 64][-64:])
            seen.append(pack.num_blocks)

    monkeypatch.setattr(Packer, "publish", watch)
    main(args)
    assert seen == sorted(seen)
    assert len(set(seen)) > 4


def test_held_out_text_of_other_files_leaves_the_corpus_whole(args, small_pieces, tmp_path):
    (tmp_path / "held.jsonl").write_bytes(jsonl(TEXTS[:30]))
    main(replace(args, held_out_documents=(str(tmp_path / "held.jsonl"),)))
    meta = read_json(args.folder / "meta.json", "")
    assert meta["num_documents"] == len(TEXTS)
    assert meta["held_out"]["first_record"] == 0
    pack = Pack(args.folder)
    assert len(pack.held_out_blocks()) == 20 + (meta["held_out"]["tokens"] - 20 * 64 - 1) // 64
    np.testing.assert_array_equal(pack.held_out_blocks()[:, 1:].flatten()[:500], pack._tokens(pack.held_out)[1:501])
    with pytest.raises(ValueError, match=r"0.jsonl is among --documents and --held_out_documents: leave it out of one"):
        main(replace(args, output_dir=str(tmp_path / "o"), held_out_documents=(str(Path(args.documents[0]) / "0.jsonl"),)))


def test_too_little_held_out_text_is_said(args, small_pieces):
    with pytest.raises(ValueError, match=r"the held-out text would be 64,001 tokens, .* has .*: pass fewer --held_out_blocks"):
        main(replace(args, held_out_blocks=1000))


# Bad documents


def test_a_bad_document_ends_the_packing_or_is_counted(args, small_pieces, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(jsonl(TEXTS[:50]) + b'{"text": 7}\n{"text": ""}\nnot json\n' + jsonl(TEXTS[50:]))
    compress(source / "b.jsonl.gz", jsonl(TEXTS[:9]))
    (source / "b.jsonl.gz").write_bytes((source / "b.jsonl.gz").read_bytes()[:-300])
    args = replace(args, documents=(str(source),), shuffle_window=0)
    with pytest.raises(ValueError, match=r"a.jsonl line 51 is no document: no string \(7\); mend it, or pass --skip_bad_docum"):
        main(args)
    assert not (args.folder / "meta.json").exists()
    main(replace(args, skip_bad_documents=True))
    meta = read_json(args.folder / "meta.json", "")
    read_of_b = meta["num_documents"] + meta["held_out"]["documents"] - len(TEXTS)
    assert 0 <= read_of_b < 9
    assert meta["left_out"] == {"damaged": 1, "empty": 1, "no string": 1, "not JSON": 1}
    out = capsys.readouterr().out
    assert f"a.jsonl line 51: no string (7)\n  {source}/a.jsonl line 53: not JSON (" in out
    assert f"{source}/b.jsonl.gz line {read_of_b + 1}: damaged (" in out


def test_an_empty_corpus_is_refused(args, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="the held-out text would be 1,281 tokens, .*a.jsonl .* has 0"):
        main(replace(args, documents=(str(tmp_path / "a.jsonl"),)))
    with pytest.raises(FileNotFoundError, match=r"no file .*\*.txt"):
        main(replace(args, documents=(str(tmp_path / "*.txt"),)))


def test_control_tokens_in_a_text_are_text(args, small_pieces, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["<|endoftext|>"] * 400))
    main(replace(args, documents=(str(tmp_path / "a.jsonl"),), held_out_blocks=1))
    tokens = np.fromfile(args.folder / "shard_00000.bin", "<u2")
    assert (tokens == 0).sum() == read_json(args.folder / "meta.json", "")["num_documents"]


# Other packs, other hands


def test_another_pack_in_the_folder_is_refused_naming_what_differs(args, small_pieces, tmp_path):
    main(args)
    before = content(args.folder)
    for change, named in {
        "seq_len": (128, "seq_len: there 64, asked 128"),
        "seed": (7, "reading.seed: there 0, asked 7"),
        "verify": ("all", "verify: there 'sample', asked 'all'"),
        "text_unit": ("line", "reading.text_unit: there 'file', asked 'line'"),
    }.items():
        with pytest.raises(ValueError, match=rf"holds other data \({named[1]}\): pass another --output_dir"):
            main(replace(args, **{change: named[0]}))
    folder = tmp_path / "other_tokenizer"
    byte_level_bpe(300).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"holds other data \(vocab_size: .*tokenizer.fingerprint"):
        main(replace(args, tokenizer=str(folder)))
    assert content(args.folder) == before
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/shard_00000.bin").write_bytes(b"??")
    with pytest.raises(ValueError, match="strange holds shard_00000.bin, which is no pack"):
        main(replace(args, output_dir=str(tmp_path / "strange")))


def test_a_changed_file_is_noticed_when_the_packing_goes_on(args, small_pieces, tmp_path):
    shutil.copytree(args.documents[0], tmp_path / "copy")
    args = replace(args, documents=(str(tmp_path / "copy"),))
    main(replace(args, total_steps=10, effective_batch=8))
    with open(tmp_path / "copy/7.jsonl", "ab") as file:
        file.write(jsonl(["more"]))
    with pytest.raises(ValueError, match=r"holds other data \(source.files"):
        main(args)


def test_two_packers_on_one_folder_are_refused(args, small_pieces):
    import fcntl

    args.folder.mkdir(parents=True)
    with open(args.folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for other in (args, replace(args, task=0, num_tasks=2)):
            with pytest.raises(RuntimeError, match="another process is packing .*: wait for it, or stop it"):
                main(other)
        fcntl.flock(file, fcntl.LOCK_SH)
        main(replace(args, task=0, num_tasks=2))  # tasks share it
        with pytest.raises(RuntimeError, match="another process is packing"):
            main(replace(args, join=True))
    main(replace(args, task=1, num_tasks=2))
    main(replace(args, join=True))


def test_wrong_arguments_are_named_together(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = Args(
        scratch_dir=str(tmp_path),
        output_dir=str(tmp_path / "file"),
        documents=("a",),
        manifest=Path("b"),
        seq_len=0,
        num_tasks=3,
        held_out_blocks=0,
    )
    with pytest.raises(ValueError, match="seq_len 0") as error:
        main(wrong)
    assert str(error.value).splitlines() == [
        "--seq_len 0: at least 1 is needed",
        "--held_out_blocks 0: at least 1 is needed",
        "--documents and --manifest b: pass one of them",
        "--num_tasks 3 without --task: pass which of them this is",
        f"{tmp_path}/file is a file, a folder is needed: pass another --output_dir",
    ]


def test_full_disk_is_said_and_the_packing_continues_after_room_is_made(args, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        small = replace(args, output_dir=str(disk / "pack"), num_workers=1)
        with pytest.raises(RuntimeError, match=r"the disk is full \(.*No space left.*\); what was packed in .* is kept"):
            main(small)
        assert not (disk / "pack/meta.json").exists()
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        main(small)
        main(args)
        assert content(disk / "pack") == content(args.folder)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# The hub


def test_c4_is_streamed_from_the_hub_and_no_more_of_it_than_is_needed(tmp_path, tokenizer_dir):
    repo = tmp_path / "hub/datasets/allenai/c4"
    (repo / "en").mkdir(parents=True)
    for number in range(8):
        compress(repo / f"en/c4-train.{number:05}-of-00008.json.gz", jsonl(TEXTS * 2))
    compress(repo / "en/c4-validation.00000-of-00001.json.gz", jsonl(["held out"] * 3000))
    data = [{"split": split, "path": f"en/c4-{split}.*.json.gz"} for split in ("train", "validation")]
    configs = json.dumps({"configs": [{"config_name": "en", "data_files": data}]})
    (repo / "README.md").write_text(f"---\n{configs}\n---\n")
    target = tmp_path / "hub/models/EleutherAI/pythia-160m"
    target.parent.mkdir(parents=True)
    target.symlink_to(tokenizer_dir)
    options = ["--scratch_dir", tmp_path / "S", "--total_steps", "100", "--effective_batch", "8", "--seq_len", "256"]
    options += ["--blocks_per_shard", "100", "--num_workers", "1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    with hub(tmp_path / "hub") as server:
        ran = subprocess.run(
            [sys.executable, "build_pretrain.py", *map(str, options)],
            cwd=ROOT,
            env=environment | {"HF_ENDPOINT": server.url},
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stderr
        opened = {path for method, path in server.asked if path.endswith(".gz") and method == "GET"}
    folder = tmp_path / "S/data/c4_packed"
    meta = read_json(folder / "meta.json", "")
    assert 800 <= meta["num_blocks"] < 2000
    assert meta["header"]["source"]["num_files"] == 8
    assert meta["about"]["first_file"].startswith("hf://datasets/allenai/c4@0123456789abcdef")
    assert meta["held_out"]["documents"] > 1000
    assert len([path for path in opened if "train" in path]) < 4
    pack = Pack(folder)
    texts = byte_level_bpe(512).decode(pack.blocks([0])[0])
    assert any(text[:50] in texts for text in TEXTS)


# Reading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta: meta.update(format="shards-1"), "meta.json has format 'shards-1', 'shards-2' is needed"),
        (lambda meta: meta["header"].pop("seq_len"), "meta.json header has seq_len None, int is needed"),
        (lambda meta: meta["header"].update(dtype="int8"), "meta.json has dtype 'int8', one of uint16, uint32 is needed"),
        (lambda meta: meta["header"].update(vocab_size=65537), "meta.json has vocab_size 65537, uint16 holds 65536 ids"),
        (lambda meta: meta["header"].update(eos_token_id=512), "has eos_token_id 512, below vocab_size 512 is needed"),
        (lambda meta: meta["header"].update(tokenizer={}), "meta.json tokenizer has fingerprint None, str is needed"),
        (lambda meta: meta["shards"][1].update(tokens="7"), "meta.json shard 1 has tokens '7', int is needed"),
        (lambda meta: meta.update(shards=[3]), "meta.json shard 0 is 3, an object is needed"),
        (lambda meta: meta["shards"][1].update(tokens=9, documents=10), "shard 1 has 10 documents in 9 tokens"),
        (lambda meta: meta["shards"][1].update(file="../x.bin"), "shard 1 is '../x.bin', shard_00001.bin is needed"),
        (lambda meta: meta["shards"].insert(1, meta["shards"][0]), "shard 1 is 'shard_00000.bin', shard_00001.bin"),
        (lambda meta: meta["shards"][0].update(records=[5, 4]), r"shard 0 has records \[5, 4\], the first and"),
        (lambda meta: meta["shards"][0].update(left_out_at=[3]), r"shard 0 has left_out_at \[3\], strings are needed"),
        (lambda meta: meta.pop("target_blocks"), "target_blocks None, int is needed"),
        (lambda meta: meta.update(target_blocks=True), "target_blocks True, int is needed"),
        (lambda meta: meta.update(target_blocks=-5), "target_blocks -5, 1 to "),
        (lambda meta: meta["next"].pop("piece"), "meta.json next has piece None, int is needed"),
        (lambda meta: meta["header"].update(seq_len=True), "meta.json header has seq_len True, int is needed"),
        (lambda meta: meta["header"].update(seq_len=10**30), "meta.json header has seq_len 10+, 1 to 2147483647 is needed"),
        (lambda meta: meta["header"].update(seq_len=0), "meta.json header has seq_len 0, 1 to"),
        (lambda meta: meta["held_out"].update(tokens=False), r"meta.json held_out has tokens False, int is needed"),
        (lambda meta: meta["held_out"].update(tokens=1, documents=1), r"held_out.bin has \d+ bytes, 2 bytes are needed"),
        (lambda meta: meta["files"].clear(), "meta.json does not list tokenizer/tokenizer.json"),
        (lambda meta: meta.update(num_blocks=7), r"meta.json has \{'num_blocks': 7\}, \{'num_blocks': \d+\} are needed"),
    ],
)
def test_a_meta_that_is_wrong_is_named(args, small_pieces, change, message):
    main(args)
    change_meta(args.folder, change)
    with pytest.raises(ValueError, match=f"{message}.*: (remove the folder and run|make it again with) build_pretrain.py"):
        Pack(args.folder)


def test_blocks_longer_than_all_text_take_no_memory(args, small_pieces):
    main(args)

    def change(meta):
        meta["header"]["seq_len"] = 2**28
        meta |= totals(meta)

    change_meta(args.folder, change)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes
    pack, shape = Pack(args.folder), (0, 2**28 + 1)
    assert (pack.num_blocks, pack.held_out_blocks().shape, pack.blocks([]).shape) == (0, shape, shape)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 2**20


def test_a_shard_of_another_size_than_its_tokens_is_named(args, small_pieces):
    main(args)

    def change(meta):
        meta["num_tokens"] -= meta["shards"][1]["tokens"] - 300
        meta["shards"][1]["tokens"] = 300
        meta |= totals(meta)

    change_meta(args.folder, change)
    with pytest.raises(ValueError, match=r"shard_00001.bin has \d+ bytes, 600 bytes are needed: remove the folder"):
        Pack(args.folder)


def test_a_flipped_byte_of_the_pack_s_tokenizer_and_of_its_meta_is_named(args, small_pieces):
    main(args)
    for path in sorted((args.folder / "tokenizer").iterdir()):
        flip(path, 30)
        with pytest.raises(ValueError, match=f"tokenizer/{path.name} has SHA-256 .* is needed: remove the folder"):
            Pack(args.folder)
        with pytest.raises(ValueError, match=f"tokenizer/{path.name} has SHA-256 .* is needed: remove the folder"):
            main(args)
        flip(path, 30)
    Pack(args.folder)
    text = (args.folder / "meta.json").read_text()
    (args.folder / "meta.json").write_text(text.replace('"compared": ', '"compared": 1', 1))
    with pytest.raises(ValueError, match="meta.json has changed since it was written"):
        Pack(args.folder)


def test_what_is_known_of_a_finished_piece_is_sealed(args, small_pieces):
    main(replace(args, task=0, num_tasks=1000))
    path = args.folder / "partial/00000/0000.json"
    before = path.read_text()
    path.write_text(before.replace('"last": true', '"last": false'))
    with pytest.raises(ValueError, match="00000/0000.json has changed since it was written"):
        main(args)
    path.write_text(before)
    change_meta(path.parent, lambda entry: entry["shard"].update(tokens=None), "0000.json")
    with pytest.raises(ValueError, match="00000/0000.json has tokens None, int is needed"):
        main(args)


def test_a_flipped_byte_in_a_shard_is_named_when_it_is_first_read(args, small_pieces):
    main(args)
    path = args.folder / "shard_00002.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    pack = Pack(args.folder)
    ends = np.cumsum([shard["tokens"] for shard in pack.shards])
    pack.blocks(range((ends[1] - 1) // 64 - 1))
    with pytest.raises(ValueError, match=r"shard_00002.bin has changed: its SHA-256 is .*: remove the folder"):
        pack.blocks([ends[1] // 64 + 1])
    with pytest.raises(ValueError, match="shard_00002.bin has changed"):
        Pack(args.folder).verify()


def test_no_pack_and_another_block_size_are_said(args, small_pieces, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no .*/meta.json and no progress.json: run build_pretrain.py"):
        Pack(tmp_path / "none")
    main(args)
    assert Pack(args.folder, 64).seq_len == 64
    with pytest.raises(ValueError, match=r"--seq_len 128, but .* has blocks of 64 \+ 1 tokens: pass --seq_len 64"):
        Pack(args.folder, 128)


# What a sample cannot show


def test_a_piece_is_packed_by_one_process_at_a_time(args, small_pieces):
    import fcntl

    main(replace(args, task=0, num_tasks=1000))
    before = content(args.folder)
    with open(args.folder / "partial/00000/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (args.folder / "partial/00000/0000.json").unlink()
        with pytest.raises(RuntimeError, match="another process is packing .*partial/00000: wait for it, or stop it"):
            main(replace(args, task=0, num_tasks=1000))
    main(replace(args, task=0, num_tasks=1000))
    assert content(args.folder) == before


def piece_of(*files) -> lm.documents.Piece:
    return lm.documents.Piece(tuple(map(str, files)), 1)


def job(tmp_path, **changes) -> lm.piece_packer.Job:
    """What a worker is told."""
    encoder = byte_level_bpe(300)
    values = {
        "partial": tmp_path / "partial",
        "reading": lm.documents.Reading(),
        "tokenizer_json": encoder.backend_tokenizer.to_str(),
        "vocab_size": 300,
    }
    values |= {"eos_token_id": 0, "dtype": np.dtype("<u2"), "shard_tokens": 10**6, "compare_all": False}
    return lm.piece_packer.Job(**values | {"skip_bad_documents": False} | changes)


def worker(of: lm.piece_packer.Job) -> lm.piece_packer.PiecePacker:
    return lm.piece_packer.PiecePacker(of, CONTEXT.Array("q", 2), CONTEXT.Value("i", 0))


@pytest.mark.parametrize(("failures", "packed"), [(4, True), (5, False)])
def test_a_network_that_fails_is_tried_five_times(tmp_path, monkeypatch, failures, packed):
    calls, slept = [], []

    def fail(_self, piece, *_):
        calls.append(piece.files[0])
        if len(calls) <= failures:
            raise ConnectionError("reset by peer")

    monkeypatch.setattr(lm.piece_packer.PiecePacker, "_pack", fail)
    monkeypatch.setattr(lm.piece_packer.time, "sleep", slept.append)
    if packed:
        worker(job(tmp_path)).pack(piece_of("hf://datasets/a/b.jsonl"), 0, 0, 0)
    else:
        with pytest.raises(ConnectionError):
            worker(job(tmp_path)).pack(piece_of("hf://datasets/a/b.jsonl"), 0, 0, 0)
    assert (len(calls), slept) == (5, [2, 4, 8, 16])
    calls.clear()
    with pytest.raises(ConnectionError):  # a file that is here is read once
        worker(job(tmp_path)).pack(piece_of("here.jsonl"), 0, 0, 0)
    assert len(calls) == 1


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:50]))
    of, piece = job(tmp_path), piece_of(tmp_path / "a.jsonl")
    worker(of).pack(piece, 0, 0, 0)
    largest = int(np.fromfile(tmp_path / "partial/00000/0000.bin", "<u2").max())
    shutil.rmtree(tmp_path / "partial")
    worker(replace(of, vocab_size=largest + 1)).pack(piece, 0, 0, 0)
    shutil.rmtree(tmp_path / "partial")
    with pytest.raises(ValueError, match=rf"the tokenizer gave id {largest}, it has {largest} tokens: take another tokenizer"):
        worker(replace(of, vocab_size=largest)).pack(piece, 0, 0, 0)


# What is compared, who packs what, and the network


@pytest.mark.parametrize("verify", ["sample", "all"])
def test_the_first_documents_of_a_piece_and_every_nth_are_compared_or_all(args, small_pieces, monkeypatch, verify):
    monkeypatch.setattr(lm.piece_packer, "COMPARED_EVERY", 10)
    main(replace(args, verify=verify))
    meta = read_json(args.folder / "meta.json", "")
    pieces: dict[int, int] = {}
    for shard in meta["shards"]:
        pieces[shard["piece"]] = shard["records"][1]
    held_out = meta["held_out"]["first_record"]
    sample = [range(held_out if piece == 0 else 0, end) for piece, end in pieces.items()]
    chosen = sum(verify == "all" or at < 4 or at % 10 == 0 for records in sample for at in records)
    assert meta["num_compared"] == chosen
    assert meta["held_out"]["compared"] == meta["held_out"]["documents"]
    assert (meta["num_compared"] == meta["num_documents"]) == (verify == "all")


def test_a_piece_on_the_hub_goes_on_at_its_last_whole_shard_when_the_network_failed(args, monkeypatch, tmp_path):
    tries, waits = [], []

    def unreliable(piece, number, reading, skip=0):
        tries.append(skip)
        (local,) = cut(find_files([f"{args.documents[0]}/0.jsonl"]), reading)
        for at, document in enumerate(read(local, number, reading, skip)):
            if at == 9 and len(tries) < 3:
                raise ConnectionError("the network is down")
            yield document

    monkeypatch.setattr(lm.piece_packer, "documents", unreliable)
    monkeypatch.setattr(lm.piece_packer, "BATCH_DOCUMENTS", 4)
    monkeypatch.setattr(lm.piece_packer.time, "sleep", waits.append)
    in_order = lm.documents.Reading(shuffle_window=0)
    worker(job(tmp_path, reading=in_order, shard_tokens=1)).pack(piece_of("hf://datasets/a/b@c/0.jsonl"), 0, 0, 0)
    assert tries == [0, 4, 8]  # from the last whole shard on; the batch after it was being read
    assert waits == [2, 4]
    entries = [read_json(path, "")["shard"] for path in sorted((tmp_path / "partial/00000").glob("*.json"))]
    assert entries[-1]["last"]
    assert sum(entry["documents"] for entry in entries) == len(TEXTS[0::8])


def test_a_pack_grows_in_the_middle_of_a_piece_without_packing_its_beginning_again(args, tmp_path, monkeypatch):
    monkeypatch.setattr(lm.piece_packer, "BATCH_DOCUMENTS", 4)
    inline(monkeypatch)
    main(replace(args, total_steps=30, effective_batch=8))
    following = read_json(args.folder / "meta.json", "")["next"]
    assert following["piece"] == 0
    assert following["shard"] > 1
    begun, pack = [], lm.piece_packer.PiecePacker.pack
    monkeypatch.setattr(lm.piece_packer.PiecePacker, "pack", lambda self, *where: begun.append(where) or pack(self, *where))
    main(args)
    assert [where[1:] for where in begun] == [(0, following["shard"], following["record"])]
    whole = replace(args, output_dir=str(tmp_path / "whole"))
    main(whole)
    assert content(args.folder) == content(whole.folder)


@pytest.mark.parametrize(("tokens", "enough"), [(6400, False), (6401, True)])
def test_the_last_block_needs_a_token_more(tmp_path, tokens, enough):
    state = lm.packer.new_state({"seq_len": 64}, {"first_record": 0}, {}, {}) | {"target_blocks": 100}
    state["shards"] = [{"piece": 0, "tokens": tokens}]
    assert lm.packer.Packer(tmp_path, state, [piece_of("a.jsonl")], job(tmp_path)).enough == enough


def test_a_pack_that_finishes_between_two_looks_is_found(args, small_pieces, monkeypatch):
    main(args)
    looks = []

    def look(path, made_by, format):
        looks.append(path.name)
        if len(looks) == 1:  # meta.json came, and progress.json went, just after this
            raise FileNotFoundError(path)
        return read_sealed(path, made_by, format)

    monkeypatch.setattr(lm.shards, "read_sealed", look)
    pack = Pack(args.folder)
    assert (looks, pack.finished) == (["meta.json", "progress.json", "meta.json"], True)


def test_a_flipped_byte_in_the_held_out_text_is_named(args, small_pieces):
    main(args)
    path = args.folder / "held_out.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    for read_it in (Pack.held_out_blocks, Pack.verify):
        with pytest.raises(ValueError, match=r"held_out.bin has changed: its SHA-256 is .*: remove the folder"):
            read_it(Pack(args.folder))


def test_once_there_is_enough_the_workers_stop_and_leave_no_piece_of_a_shard(args, small_pieces, tmp_path, monkeypatch):
    stops, start = [], lm.packer._start
    monkeypatch.setattr(lm.packer, "_start", lambda job, done, stop: stops.append(stop) or start(job, done, stop))
    main(replace(args, total_steps=10, effective_batch=8))
    assert [stop.value for stop in stops] == [1]
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS[:9]))
    one = worker(job(tmp_path))
    one.stop.value = 1
    with pytest.raises(lm.piece_packer.Stopped):
        one.pack(piece_of(tmp_path / "a.jsonl"), 0, 0, 0)
    assert [path.name for path in (tmp_path / "partial/00000").iterdir()] == ["lock"]


def test_a_pack_that_is_made_anew_while_it_is_read_is_noticed(args, small_pieces):
    main(replace(args, total_steps=20, effective_batch=8))
    pack = Pack(args.folder)
    shutil.rmtree(args.folder)
    main(replace(args, seed=5, total_steps=20, effective_batch=8))
    with pytest.raises(ValueError, match="was packed anew while it was read"):
        pack.refresh()
