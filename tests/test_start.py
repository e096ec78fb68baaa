"""What a trainer does not load before its first step, and where its compiled kernels are kept.

How long a start takes, python -m benchmarks.first_step measures.
"""

import importlib
import json
import os
import subprocess
import sys
import threading
from multiprocessing import active_children
from pathlib import Path

import pytest
from training import ROOT, flags
from world import World

from lm.args import parse
from lm.xoshiro import KERNELS, cache_folder

# Each costs a tenth of a second to several. What transformers and accelerate import themselves (scipy, boto3, torch._dynamo)
# cannot be helped.
HEAVY = {"awkward", "bitsandbytes", "datasets", "datatrove", "evaluate", "gigatoken", "lm_eval", "matplotlib", "pandas", "peft"}
HEAVY |= {"sklearn", "tensorboard", "torch._inductor.compile_fx", "transformers.trainer", "trl", "wandb"}
WITHOUT = {"train": HEAVY | {"faker", "numba", "pyarrow"}, "pptrain": HEAVY | {"pyarrow"}, "pretrain": HEAVY}
PREPARE = """
import gc, json, sys
import {trainer}
from lm.args import parse
collector = gc.isenabled(), gc.get_freeze_count() > 100_000
{trainer}.prepare(parse({trainer}.Args, sys.argv[1:]))
print(json.dumps([*collector, sorted(sys.modules)]))
"""
# Each process asks for one kind of code, and looks for a long time at what is kept before it adds to it.
COMPILE = """
import sys, time
import numba.core.caching, numpy as np
from lm.xoshiro import below
of = numba.core.caching.IndexDataCacheFile
load = of._load_index
of._load_index = lambda self: (load(self), time.sleep(float(sys.argv[2])))[0]
print([below(np.arange(4, dtype=np.uint64), np.dtype(kind).type(2**7 - 1)) for kind in sys.argv[1].split(",")])
print(sum(below.stats.cache_misses.values()), "compiled")
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("start") / "world")


@pytest.mark.parametrize("trainer", WITHOUT)
def test_nothing_heavy_is_imported_before_a_run_begins(trainer, world, tmp_path):
    given = flags(**world.options(trainer), output_dir=tmp_path / "run")
    command = [sys.executable, "-c", PREPARE.format(trainer=trainer), *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    collecting, frozen, imported = json.loads(done.stdout.splitlines()[-1])
    assert WITHOUT[trainer] & set(imported) == set()
    assert (collecting, frozen) == (True, True), "the garbage collector works, but not on what was imported"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("trainer", "slow", "data"),
    [
        ("train", "load_tokenizer", "read_papers"),
        ("pptrain", "build_model", "encode_subset"),
        ("pretrain", "build_model", "encode_subset"),
    ],
)
def test_data_are_read_while_the_tokenizer_is_loaded_or_the_model_built(trainer, slow, data, world, tmp_path, monkeypatch):
    """Neither returns before the other has begun."""
    meeting, module, met = threading.Barrier(2, timeout=60), importlib.import_module(trainer), []

    def meets(name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            meeting.wait()
            met.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    meets(slow)
    meets(data)
    module.prepare(parse(module.Args, flags(**world.options(trainer), output_dir=tmp_path / "run")))
    assert sorted(met) == sorted([slow, data])


@pytest.mark.parametrize("trainer", ["train", "pptrain"])
def test_loader_processes_are_forked_before_there_is_a_model_that_they_would_hold(trainer, world, tmp_path, monkeypatch):
    """A copy of its first weights in each process, and of each page when the trainer first writes to it."""
    module, loaders = importlib.import_module(trainer), []
    build = module.build_model
    monkeypatch.setattr(module, "build_model", lambda *given: loaders.extend(active_children()) or build(*given))
    before, options = set(active_children()), flags(**world.options(trainer), output_dir=tmp_path / "run", num_workers=2)
    ready = module.prepare(parse(module.Args, options))
    assert len(set(loaders) - before) == 2
    assert set(active_children()) - before == set(loaders) - before
    del ready


def sources(folder: Path) -> Path:
    """The files that functions are compiled from, as far as `cache_folder` is concerned."""
    folder.mkdir()
    for name in KERNELS:
        (folder / name).write_text("x = 1\n")
    return folder


def test_kernels_are_kept_with_the_user_where_the_code_cannot_be_written_to(tmp_path, monkeypatch):
    code = sources(tmp_path / "code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    beside = cache_folder(code)
    assert beside.parent == code / "__pycache__"
    beside.rmdir()
    beside.parent.rmdir()
    beside.parent.write_text("no folder can be made here, also not by root")
    elsewhere = cache_folder(code)
    assert elsewhere == tmp_path / "caches/small-lm-research" / beside.name
    (code / KERNELS[-1]).write_text("x = 2\n")
    assert cache_folder(code).parent == elsewhere.parent
    assert cache_folder(code) != elsewhere


def test_kernels_work_where_nothing_can_be_kept(tmp_path):
    package = tmp_path / "lm"
    package.mkdir()
    for name in KERNELS:
        (package / name).write_bytes((ROOT / "lm" / name).read_bytes())
    (package / "__pycache__").write_text("no folder can be made here, also not by root")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HOME": str(package / "__pycache__")}
    environment = {name: value for name, value in environment.items() if name not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", COMPILE, "int64", "0"], cwd=tmp_path, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_no_kernel_is_lost_that_processes_keep_at_once(tmp_path):
    kinds = ("int64", "int32", "int16", "int8")
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "kept")}

    def start(what: str, pause: float) -> subprocess.Popen:
        command = [sys.executable, "-c", COMPILE, what, str(pause)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)

    first = [process.communicate()[0] for process in [start(kind, 0.3) for kind in kinds]]
    together = start(",".join(kinds), 0).communicate()[0].splitlines()
    assert [text.splitlines()[0].strip("[]") for text in first] == together[0].strip("[]").split(", ")
    assert [text.splitlines()[1] for text in first] == ["1 compiled"] * 4
    assert together[1] == "0 compiled"
