"""What packing a corpus of any size costs in memory, and how often it looks at each file before the first shard."""

import contextlib
import itertools
import os
import string
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from text import byte_level_bpe

import lm.text_encoder
from lm.corpus import digest, read_manifest
from lm.documents import Reading, cut
from lm.shards import Pack
from lm.text_encoder import TextEncoder, resident_bytes

ROOT = Path(__file__).parents[1]
MEGABYTE = 1_000_000


def manifest_of(folder: Path, number: int) -> Path:
    """A manifest of so many files of one line; their names have 34 characters and more."""
    lines = []
    for i in range(number):
        if i % 1000 == 0:
            (folder / f"part_{i // 1000:05d}").mkdir(parents=True)
        lines.append(f"part_{i // 1000:05d}/document_{i:08d}.jsonl")
        (folder / lines[-1]).write_bytes(b'{"text": "a"}\n')
    manifest = folder / "manifest.txt"
    manifest.write_text("".join(f"{line}\n" for line in lines))
    return manifest


def known(manifest: Path) -> list:
    """What build_pretrain.py knows of a corpus before it reads any of it."""
    files, reading = read_manifest(manifest), Reading()
    return [files, digest(files), cut(files, reading)]


@pytest.fixture(scope="module")
def manifests(tmp_path_factory) -> dict[int, Path]:
    return {number: manifest_of(tmp_path_factory.mktemp(f"names_{number}"), number) for number in (2_000, 12_000)}


def test_a_name_costs_half_a_kilobyte(manifests):
    """Path, size and time, at the most and afterwards; 10 B tokens in files of 400 kB are 100,000 names."""
    kept, most = {}, {}
    for number, manifest in manifests.items():
        tracemalloc.start()
        found = known(manifest)
        kept[number], most[number] = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(found[0]) == number
    assert (most[12_000] - most[2_000]) / 10_000 < 600
    assert (kept[12_000] - kept[2_000]) / 10_000 < 300


def test_each_file_is_looked_at_once_and_none_is_opened_before_packing(manifests, monkeypatch):
    looks, stat, builtin = Counter(), os.stat, open
    monkeypatch.setattr(os, "stat", lambda path, *rest, **more: looks.update([str(path)]) or stat(path, *rest, **more))
    monkeypatch.setattr("builtins.open", lambda path, *rest, **more: looks.update([str(path)]) or builtin(path, *rest, **more))
    files, _, pieces = known(manifests[2_000])
    monkeypatch.undo()
    assert {looks[file.name] for file in files} == {1}
    assert [len(piece.files) for piece in pieces] == [2_000]


def words(number: int, first: int) -> list[str]:
    """Texts of a thousand words, each word another, such as "bcdza"."""
    letters = itertools.product(string.ascii_lowercase, repeat=5)
    found = list(itertools.islice(map("".join, letters), first, first + number))
    return [" ".join(found[i : i + 1000]) for i in range(0, number, 1000)]


def test_an_encoder_forgets_words_before_they_fill_the_memory(monkeypatch):
    """gigatoken keeps each word it has met: of two million 180 MB. The ids stay those of Hugging Face."""
    encoder = TextEncoder(byte_level_bpe(512).backend_tokenizer.to_str())
    assert encoder.name.startswith("gigatoken ")
    encoder.encode(words(100_000, 0))

    def growth(first: int) -> int:
        before = resident_bytes()
        for start in range(first, first + 2_000_000, 200_000):
            encoder.encode(words(200_000, start))
        return resident_bytes() - before

    monkeypatch.setattr(lm.text_encoder, "MOST_GROWTH", 30 * MEGABYTE)
    assert growth(100_000) < 80 * MEGABYTE
    texts = words(20_000, 0) + words(20_000, 2_000_000)
    found = encoder.encode(texts, range(len(texts)))
    assert (found.differing, found.num_compared) == ([], len(texts))
    np.testing.assert_array_equal(found.ids, np.concatenate(encoder._exact(texts)))
    monkeypatch.setattr(lm.text_encoder, "MOST_GROWTH", 10**12)
    assert growth(3_000_000) > 80 * MEGABYTE, "or this test tests nothing"


def watch(command: list[str], pack: Path) -> list[tuple[int, dict[str, int]]]:
    """Shards published so far and the resident bytes of the packer itself and of its worker, many times until it ends."""
    process, found = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE), []
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = process.children(recursive=True)
            workers = [child for child in children if child.ppid() != process.pid]  # of the server that forks them
            memory = {"itself": process.memory_info().rss}
            memory |= {"worker": sum(child.memory_info().rss for child in workers)} if workers else {}
            found.append((len(list(pack.glob("shard_*"))), memory))
        time.sleep(0.05)
    assert process.returncode == 0, process.stderr.read().decode()[-2000:]
    return found


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shards(samples, tmp_path):
    """But for what is known of each, some 5 kB: while 40 shards of 600 kB are packed as while the first 20 were."""
    byte_level_bpe(512).save_pretrained(tmp_path / "tokenizer")
    text = (samples / "pubmed/validation.jsonl").read_bytes()
    for number in range(36):
        (tmp_path / f"{number}.jsonl").write_bytes(text)
    (tmp_path / "manifest.txt").write_text("".join(f"{number}.jsonl\n" for number in range(36)))
    command = [sys.executable, str(ROOT / "build_pretrain.py"), "--scratch_dir", str(tmp_path / "S"), "--num_workers", "1"]
    command += ["--manifest", str(tmp_path / "manifest.txt"), "--tokenizer", str(tmp_path / "tokenizer"), "--seq_len", "64"]
    command += ["--blocks_per_shard", "64", "--held_out_blocks", "16", "--shuffle_window", "500"]
    pack = tmp_path / "S/data/c4_packed"
    found = watch(command, pack)
    assert len(Pack(pack).shards) > 60
    for name, most in {"itself": 20_000, "worker": 60_000}.items():
        early, late = (
            max(memory[name] for shards, memory in found if name in memory and low <= shards < high)
            for low, high in ((1, 21), (21, 61))
        )
        assert late - early < 40 * most, (name, early, late)
