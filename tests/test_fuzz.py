"""Whatever stands in a file that a reader opens: it is read rightly, or refused by name; never another exception, never a hang.

Each file is broken in many ways twice: as it lies there, and with checksums made right again, so that what is checked behind
them is reached. FUZZ_EXAMPLES=2000 looks longer, and elsewhere each time.
"""

import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packs import write_pack
from text import SPLITS as PAPERS_OF
from text import byte_level_bpe, write_store

import build_data_splits
from lm.corpus import kind_of, read_manifest
from lm.labelled import open_labelled
from lm.paper_writer import PaperWriter
from lm.papers import Papers, read_papers
from lm.piece_packer import finished
from lm.run_records import is_finished, read_run, whole_lines
from lm.shards import Pack
from lm.splits import SETS, Splits, read_splits

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
bounded = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=10_000,  # milliseconds, for one file: what takes so long hangs
    suppress_health_check=list(HealthCheck),
)
GIGABYTE = 2**20  # in the kilobytes of getrusage

# Files, broken


HARD = [  # what Python's own reader takes, or takes down with it
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1" * 5000,
    b"-" + b"9" * 30,
    b'"\\ud800"',
    b'"\xff"',
    b"[" * 100_000,
    b"[" * 90 + b"]" * 90,
    b'{"a":' * 3000,
    b'{"a": 1, "a": 2}',
    b'"\\u0000/../x"',
    b"\xef\xbb\xbf{}",
    b"",
]
near = st.sampled_from([0, 1, -1, 3, 2**31, 2**63, 2**64, 10**30, True, False, None, 1.0, -0.5, 1e308])
near |= st.sampled_from(["", "1", "..", "x" * 5000, [], {}, [[]], ["a"], {"a": None}])
leaf = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10)
anything = near | st.recursive(
    leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)
MARK = "@@ something hard @@"


def changed(draw: Callable, value: Any) -> Any:
    """The value with one thing in it changed."""
    inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inner or draw(st.integers(0, 9)) == 0:
        if type(value) is int and draw(st.booleans()):
            return draw(st.sampled_from([value + 1, value - 1, -value, 2 * value, float(value), str(value), [value]]))
        return draw(anything | st.just(MARK))
    key, copy = draw(st.sampled_from(inner)), value.copy()
    what = draw(st.sampled_from(["inside"] * 6 + ["drop", "add", "rename"]))
    if what == "inside":
        copy[key] = changed(draw, value[key])
    elif what == "drop":
        del copy[key]
    elif isinstance(value, dict):
        copy[draw(st.sampled_from(["sha256", "../x", "/x", "a\\b", *inner]) | st.text(max_size=8))] = copy.get(key)
        if what == "rename":
            del copy[key]
    else:
        copy.insert(key, draw(anything) if what == "add" else draw(st.sampled_from(value)))
    return copy


def dumped(draw: Callable, value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode().replace(json.dumps(MARK).encode(), draw(st.sampled_from(HARD)))


def changed_bytes(draw: Callable, content: bytes) -> bytes:
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    what = draw(st.sampled_from(["flip", "cut", "insert", "other", "hard"]))
    if what == "flip" and content:
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if what == "cut":
        return content[:at]
    if what == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:]
    return draw(st.binary(max_size=60) if what == "other" else st.sampled_from(HARD))


def changed_lines(draw: Callable, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    what = draw(st.sampled_from(["inside"] * 5 + ["drop", "double", "swap", "blank"]))
    if what == "inside":
        try:
            lines[at] = dumped(draw, changed(draw, json.loads(lines[at]))) + b"\n"
        except ValueError:  # a manifest
            lines[at] = changed_bytes(draw, lines[at])
    elif what == "drop":
        del lines[at]
    elif what == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(at, lines[other] if what == "double" else b"\n")
    return b"".join(lines)


def broken(draw: Callable, name: str, content: bytes) -> bytes:
    """The content with something changed in it, or other content."""
    what = draw(st.sampled_from(["bytes", "json", "inside", "inside", "inside"]))
    if what == "bytes":
        return changed_bytes(draw, content)
    if what == "json":
        return dumped(draw, draw(anything))
    return dumped(draw, changed(draw, json.loads(content))) if name.endswith(".json") else changed_lines(draw, content)


def seal(content: bytes) -> bytes:
    """The content with a seal that is right, if it can have one; written without the product's own function."""
    try:
        value = json.loads(content)
        value.pop("sha256", None)
        rest = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, AttributeError, TypeError, RecursionError):
        return content
    return json.dumps(value | {"sha256": hashlib.sha256(rest.encode()).hexdigest()}).encode()


# The doors: who opens which file, and what is true of all that comes in


@dataclass(frozen=True)
class Door:
    file: str
    read: Callable[[Path], Any]
    holds: Callable[[Path, Any], None]  # what was read is right, by other means
    sealed: bool = False  # with a checksum of itself
    listed: bool = False  # with a checksum in meta.json
    named: str = ""  # in the message, instead of the file


def papers_hold(folder: Path, papers: Papers) -> None:
    size = (folder / "tokens.bin").stat().st_size
    assert papers.tokens.nbytes == size == papers.meta["num_tokens"] * papers.tokens.itemsize
    ends = np.cumsum(papers.lengths)
    assert (papers.lengths > 0).all()
    assert papers.offsets.tolist() == [0, *ends[:-1].tolist()]
    assert ends[-1] == len(papers.tokens)
    assert 0 < papers.meta["vocab_size"] <= 2 ** (8 * papers.tokens.itemsize)
    assert len(set(papers.paper_ids)) == len(papers.paper_ids) == papers.meta["num_papers"] == len(papers.categories)
    assert sorted(np.concatenate([*papers.splits.values()]).tolist()) == list(range(len(papers.paper_ids)))
    named = [papers.category_names[code] for code in papers.categories]
    for name, counts in papers.meta["categories"].items():
        of = [length for length, category in zip(papers.lengths.tolist(), named, strict=True) if category == name]
        assert counts == {"papers": len(of), "tokens": sum(of)}
    f"{sum(papers.meta['left_out'].values()):,} {papers.meta['tokenizer']['name']}"  # as it is shown


def splits_hold(folder: Path, splits: Splits) -> None:
    assert splits.task.faults() == []
    prompts = [row["input_text"] for name in SETS for row in splits.rows(name)]
    assert len(set(prompts)) == len(prompts) == len(splits.reserved)
    for name in SETS:
        lines = (folder / f"{name}.jsonl").read_bytes().splitlines()
        assert [json.loads(line) for line in lines] == splits.rows(name)
        assert len(lines) == splits.meta["files"][f"{name}.jsonl"]["count"]
        for row in splits.rows(name):
            assert row["output_texts"]
            assert all(text.encode() is not None for text in [row["input_text"], *row["output_texts"]])
    args = build_data_splits.Args(scratch_dir=folder, max_lookahead=splits.task.max_lookahead)
    build_data_splits.summary(args, splits.meta)


def read_pack(folder: Path) -> tuple[Pack, list, np.ndarray]:
    pack = Pack(folder)
    pack.refresh()
    pack.verify()
    return pack, pack.blocks(range(min(pack.num_blocks, 3))), pack.held_out_blocks()


def pack_holds(folder: Path, found: tuple[Pack, list, np.ndarray]) -> None:
    pack, blocks, held_out = found
    stream = b"".join(path.read_bytes() for path in sorted(folder.glob("shard_*.bin"))[: len(pack.shards)])
    whole = np.frombuffer(stream, pack.dtype)
    assert len(whole) == pack.num_tokens
    assert pack.header["eos_token_id"] < pack.header["vocab_size"] <= 2 ** (8 * pack.dtype.itemsize)
    assert pack.target_blocks is None or pack.target_blocks > 0
    length = pack.seq_len + 1
    for block, tokens in enumerate(blocks):
        assert tokens.tolist() == whole[block * pack.seq_len :][:length].tolist()
        pack.where(block)
    tokens = (folder / "held_out.bin").stat().st_size // pack.dtype.itemsize
    assert held_out.shape == (max(tokens - 1, 0) // pack.seq_len, length)
    assert len(pack.identity) == 64


def read_writer(folder: Path) -> PaperWriter:
    writer = PaperWriter(folder, json.loads((folder / "header.json").read_text()), PAPERS_OF)
    writer.close()
    return writer


def writer_holds(folder: Path, writer: PaperWriter) -> None:
    assert writer.rows.keys() == PAPERS_OF.keys()
    assert all(type(count) is int and count >= 0 for count in [*writer.rows.values(), *writer.left_out.values()])
    size = (folder / "partial/tokens.bin").stat().st_size
    assert size == writer.num_tokens * 2


def manifest_holds(folder: Path, files: list) -> None:
    assert files
    for file in files:
        assert Path(file.name).stat().st_size == file.size
        assert kind_of(file.name)


def read_labelled(folder: Path) -> list:
    files = {split: [folder / f"{split}.jsonl"] for split in ("train", "validation", "test")}
    splits = open_labelled(str(folder), "", files, None)
    return [row for split in splits.values() for batch in split.batches(0, ["a", "b"]) for row in batch]


def labelled_hold(folder: Path, rows: list) -> None:
    for text, label, why_not in rows:
        assert (text is None) == (label is None) == (why_not is not None)
        if text is not None:
            assert text.encode().strip()
            assert label.strip()


def run_holds(folder: Path, run: dict) -> None:
    assert "mixin_percent" in run["args"]


def records_hold(folder: Path, rows: list[dict]) -> None:
    assert all(type(row["step"]) is int for row in rows)


def entry_holds(folder: Path, entry: dict | None) -> None:
    assert entry is not None
    assert 0 <= entry["documents"] <= entry["tokens"]
    assert 0 <= entry["records"][0] <= entry["records"][1]
    assert type(entry["last"]) is bool
    assert sum(entry["left_out"].values()) >= 0


def nothing(folder: Path, found: Any) -> None:
    """There is nothing to be wrong."""


def verified_papers(folder: Path) -> Papers:
    return read_papers(folder, verify=True)


DOORS = {
    "papers": [
        Door("meta.json", verified_papers, papers_hold, sealed=True),
        Door("index.jsonl", verified_papers, papers_hold, listed=True),
        Door("splits.json", verified_papers, papers_hold, listed=True),
    ],
    "writer": [Door("partial/progress.json", read_writer, writer_holds, sealed=True)],
    "splits": [
        Door("meta.json", read_splits, splits_hold, sealed=True),
        Door("eval.jsonl", read_splits, splits_hold, listed=True),
    ],
    "pack": [Door("meta.json", read_pack, pack_holds, sealed=True)],
    "growing": [Door("progress.json", read_pack, pack_holds, sealed=True)],
    "piece": [Door("0000.json", lambda folder: finished(folder, 0), entry_holds, sealed=True)],
    "corpus": [Door("manifest.txt", lambda folder: read_manifest(folder / "manifest.txt"), manifest_holds)],
    "labelled": [Door("train.jsonl", read_labelled, labelled_hold, named="train")],
    "run": [
        Door("run.json", lambda folder: read_run(folder, "pretrain.py"), run_holds, named="/run"),
        Door("train.jsonl", lambda folder: whole_lines(folder / "train.jsonl", "step"), records_hold),
        Door("final/about.json", lambda folder: is_finished(folder, 5, "pretrain.py"), nothing),
    ],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A small whole example of each."""
    here = tmp_path_factory.mktemp("whole")
    write_store(here / "papers")
    args = {"max_input_size": 24, "max_lookahead": 4, "num_processes": 1, "eval_size": 5, "test_size": 3, "mixin_size": 3}
    build_data_splits.build(build_data_splits.Args(scratch_dir=here, **args), here / "splits")
    write_pack(here / "pack", byte_level_bpe(), shards=2, per_shard=1)
    shutil.copytree(here / "pack", here / "growing")
    (here / "growing/meta.json").rename(here / "growing/progress.json")
    entry = json.loads((here / "pack/meta.json").read_text())["shards"][0]
    (here / "piece").mkdir()
    (here / "piece/0000.json").write_bytes(seal(json.dumps({"shard": entry}).encode()))
    (here / "corpus").mkdir()
    for name in ("a.jsonl", "b.txt", "manifest.txt"):
        (here / "corpus" / name).write_text("a.jsonl\n\nb.txt\n./../corpus/c.md\n")
    (here / "corpus/c.md").write_text("c")
    (here / "labelled").mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"text": "some text", "label": "a"}, {"text": "more", "label": 1}, {"text": "", "label": None}]
        (here / f"labelled/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "run/final").mkdir(parents=True)
    (here / "run/run.json").write_text(json.dumps({"args": {"mixin_percent": 0.0, "seed": 1}, "derived": {}}))
    (here / "run/train.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": null}\n')
    (here / "run/final/about.json").write_text('{"step": 5}')
    header = {"dtype": "uint16", "vocab_size": 300, "tokenizer": {"name": "t", "fingerprint": "f"}, "source": {}}
    (here / "writer").mkdir()
    (here / "writer/header.json").write_text(json.dumps(header))
    writer = PaperWriter(here / "writer", header, PAPERS_OF)
    writer.add("train", "a", np.arange(5))
    writer.leave_out("train", "empty")
    writer.commit()
    writer.close()
    return here


CASES = [
    pytest.param(kind, door, again, id=f"{kind}-{door.file}{'-with right checksums' * again}")
    for kind, doors in DOORS.items()
    for door in doors
    for again in ([False, True] if door.sealed or door.listed else [False])
]


def opened(door: Door, folder: Path) -> tuple[Any, str | None]:
    """What the reader gives, or its message; any other exception is a fault."""
    try:
        return door.read(folder), None
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


@pytest.mark.parametrize(("kind", "door", "again"), CASES)
def test_whatever_a_file_holds_it_is_read_rightly_or_refused_by_name(folders, kind, door, again):
    folder = folders / kind
    before = {path: path.read_bytes() for path in (folder / door.file, folder / "meta.json") if path.exists()}
    kept = {path: path.read_bytes() for path in folder.glob("partial/*.*")} | before
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    door.holds(folder, door.read(folder))
    refused = []

    def look(content: bytes) -> None:
        for path, whole in kept.items():
            path.write_bytes(whole)
        (folder / door.file).write_bytes(seal(content) if again and door.sealed else content)
        if again and door.listed:
            meta = json.loads(before[folder / "meta.json"])
            meta["files"][door.file] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            (folder / "meta.json").write_bytes(seal(json.dumps(meta).encode()))
        found, why_not = opened(door, folder)
        if why_not is not None:
            # with right checksums one of two files that disagree is named, and either may be it
            assert (str(folder) if again and door.sealed else door.named or Path(door.file).name) in why_not
            assert len(why_not) < 20_000
            refused.append(why_not)
            return
        door.holds(folder, found)
        if not again and door.sealed:  # nothing but the layout was changed
            assert json.loads(content) == json.loads(before[folder / door.file])
        if not again and door.listed:
            assert content == before[folder / door.file]

    @settings(bounded, max_examples=EXAMPLES * (3 if again else 1))  # more is reached behind the checksums
    @given(st.data())
    def fuzz(data):
        look(broken(data.draw, door.file, before[folder / door.file]))

    try:
        for hard in HARD:
            look(hard)
            look(before[folder / door.file] + hard + b"\n")
        fuzz()
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < GIGABYTE
