"""What a run survives, tried on real processes of the real scripts: each trial raises if a promise is broken.

tests/test_faults.py makes a few of each, benchmarks/faults.py any number. A trial draws all of its choices from `rng`, works in
`folder`, and returns what it did, for the record.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import graph_runs
import packs
from launch import ROOT, Launch, arguments
from s3_proxy import CuttingProxy
from slurm import Cluster, wait_until
from text import byte_level_bpe, documents, write_store
from training import TINY, events, outcome

import build_data_splits
from lm.args import parse
from lm.checkpoint import Checkpoints, damage
from lm.mixed_rows import MixedRows
from lm.run import EXIT_STOPPED

TRAINERS = ("train", "pptrain", "pretrain")
LOSS_TOLERANCE = 1e-4  # relative, between runs on different numbers of processes: float addition in another order
Detail = dict[str, Any]


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing happened to."""

    folder: Path
    result: dict[str, Any]
    seconds: float


@dataclass
class World:
    """Small real data for every trainer, and runs on it that nothing disturbs, each made when it is first asked for."""

    folder: Path
    runs: dict[Any, Undisturbed] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = byte_level_bpe()
        self.folder.mkdir(parents=True)
        write_store(self.folder / "papers")
        tokenizer.save_pretrained(self.folder / "tokenizer")
        sizes = {"eval_size": 20, "test_size": 40, "mixin_size": 7, "num_processes": 1}
        for name, task in {"stages": (36, 6), "mixin": (12, 2)}.items():
            options = sizes | {"scratch_dir": self.folder / name, "max_input_size": task[0], "max_lookahead": task[1]}
            build_data_splits.main(parse(build_data_splits.Args, arguments(**options)))
            next((self.folder / name / "data/nl_splits").glob("mis*")).rename(self.folder / f"{name}_splits")
        packs.write_pack(self.folder / "pack", tokenizer)

    def options(self, trainer: str) -> dict[str, Any]:
        """The arguments of a run of about forty steps, all but its folder."""
        here = self.folder
        graphs = {"scratch_dir": here, "tokenizer": here / "tokenizer", "data_dir": here / "stages_splits"}
        text = {"scratch_dir": here, "c4_dir": here / "pack", "data_dir": here / "mixin_splits", "pptrain_checkpoint": "none"}
        own = {
            "train": TINY | {"data_dir": here / "papers"},
            "pptrain": graph_runs.CURRICULUM | graphs,
            "pretrain": packs.SETTINGS | text | {"total_steps": 36, "model": "neox-64x2"},
        }
        return own[trainer] | {"ledger": True, "force_cpu": True}

    def start(self, trainer: str, folder: Path, processes: int = 1, before: Callable | None = None, **changes: Any) -> Launch:
        """A run in `folder`, on its way."""
        options = self.options(trainer) | {"output_dir": folder} | changes
        return Launch(f"{trainer}.py", options, Path(f"{folder}.out"), processes, before)

    def finish(self, trainer: str, folder: Path, processes: int = 1, **changes: Any) -> None:
        """Run it to its end."""
        launch = self.start(trainer, folder, processes, **changes)
        assert launch.wait() == [0] * processes, launch.said()

    def undisturbed(self, trainer: str, processes: int = 1, name: str = "", prepare: Callable | None = None) -> Undisturbed:
        """The run that a trial's is compared with; `prepare` may put something into its folder, `name` tells it from others."""
        key = (trainer, processes, name)
        if key not in self.runs:
            folder = self.folder / "undisturbed" / f"{trainer}_{processes}{name}"
            folder.parent.mkdir(exist_ok=True)
            if prepare is None:  # the first process of all is slow: once for the clock
                self.finish(trainer, folder, processes)
                shutil.rmtree(folder)
            else:
                prepare(folder)
            before = time.monotonic()
            self.finish(trainer, folder, processes)
            self.runs[key] = Undisturbed(folder, whole(folder), time.monotonic() - before)
        return self.runs[key]


def whole(folder: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on what happened to it, its ledger included."""
    return outcome(folder) | {"ledger": (folder / "logs/ledger.jsonl").read_text()}


def check_same(folder: Path, expected: dict[str, Any]) -> None:
    """Every part of the run's outcome is as expected, and its log has every step once."""
    found = whole(folder)
    differing = [name for name in expected | found if expected.get(name) != found.get(name)]
    assert not differing, f"{folder}: {', '.join(differing)} differ from the undisturbed run"
    steps = [record["step"] for record in found["train"]]
    assert steps == sorted(set(steps)), f"{folder}: the log has steps {steps}"


def check_checkpoints(folder: Path) -> None:
    """Whatever is under a final name is whole."""
    faults = {path.name: damage(path) for path in Checkpoints(folder / "checkpoints", 3).paths()}
    assert not any(faults.values()), f"{folder}: {faults}"


def newest_of(folder: Path) -> Path:
    """The newest checkpoint of a run, good or not."""
    return Checkpoints(folder / "checkpoints", 3).paths()[-1]


# SIGKILL


def killed(
    world: World, rng: random.Random, folder: Path, trainer: str = "", processes: int = 0, where: str = "", most: int = 12
) -> Detail:
    """SIGKILL at a random moment, or in the midst of writing a checkpoint, `most` times or until the run is done."""
    trainer, processes = trainer or rng.choice(TRAINERS), processes or rng.choice((1, 2))
    where = where or rng.choice(("anywhere", "in a checkpoint write"))
    expected = world.undisturbed(trainer, processes)
    kills = 0
    while True:
        launch = world.start(trainer, folder, processes)
        if kills < most:
            until(launch.ended, rng.random() * expected.seconds)
            if where == "in a checkpoint write":
                until(lambda running=launch: running.ended() or half_written(folder), 60)
                time.sleep(rng.random() * 0.02)
        if kills == most or launch.ended():
            assert launch.wait() == [0] * processes, launch.said()
            break
        if processes == 2 and rng.random() < 0.5:  # one of them; then its launcher ends the other
            launch.send(signal.SIGKILL, rng.randrange(2))
            launch.send(signal.SIGTERM)
            until(launch.ended, rng.random() * 2)
        launch.kill()
        kills += 1
        check_checkpoints(folder)
    check_same(folder, expected.result)
    return {"trainer": trainer, "processes": processes, "where": where, "kills": kills}


def half_written(folder: Path) -> bool:
    """Whether a checkpoint or a model is being written, replaced or removed."""
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder / "checkpoints") + os.listdir(folder)
        return any(name.startswith(".") and name.endswith((".partial", ".old", ".gone")) for name in names)
    return False


def until(true: Callable[[], bool], seconds: float) -> bool:
    """Wait until it is true, no longer than this; say whether it is."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


# Signals


def signalled(world: World, rng: random.Random, folder: Path, trainer: str = "", processes: int = 0) -> Detail:
    """SIGTERM, SIGUSR1 or Ctrl-C to one process or to all, loaders included, at random moments of up to three sessions."""
    trainer, processes = trainer or rng.choice(TRAINERS), processes or rng.choice((1, 2))
    expected = world.undisturbed(trainer, processes)
    stops, sent = 0, []
    for _ in range(3):
        launch = world.start(trainer, folder, processes)
        sessions = count_events(folder, "started", "resumed")
        assert until(lambda n=sessions: count_events(folder, "started", "resumed") > n, 60), launch.said()
        until(launch.ended, rng.random() * expected.seconds * 0.8)
        number, target = rng.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)), rng.choice(("one", "all", "loaders too"))
        sent.append(f"{number.name} to {target}")
        if target == "loaders too":
            for each in launch.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(each.pid, number)
        else:
            launch.send(number, rng.randrange(processes) if target == "one" else None)
        codes = launch.wait(timeout=30)
        check_checkpoints(folder)
        if codes == [0] * processes:  # it came after the last step
            break
        assert codes == [EXIT_STOPPED] * processes, f"{sent[-1]}: codes {codes}: {launch.said()}"
        stopped = events(folder)[-1]
        newest = newest_of(folder)
        assert (stopped["event"], stopped["signal"]) == ("stopped", number.name)
        assert newest.name == f"step_{stopped['step']:08d}", f"{newest} after a stop at step {stopped['step']}"
        stops += 1
    world.finish(trainer, folder, processes)
    check_same(folder, expected.result)
    return {"trainer": trainer, "processes": processes, "sent": sent, "stops": stops}


def count_events(folder: Path, *names: str) -> int:
    """How many of these events a run has written."""
    lines = (folder / "events.jsonl").read_bytes().split(b"\n")[:-1] if (folder / "events.jsonl").exists() else []
    return sum(json.loads(line)["event"] in names for line in lines)


# Another number of processes


def resized(world: World, rng: random.Random, folder: Path, trainer: str = "") -> Detail:
    """Another number of processes and another split of the same effective batch at every resume."""
    trainer = trainer or rng.choice(TRAINERS)
    expected = world.undisturbed(trainer)
    batch = world.options(trainer)["effective_batch"]
    layouts = [(p, m) for p in (1, 2, 3) for m in range(1, batch + 1) if batch % (p * m) == 0]
    used = []
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL, signal.SIGTERM, None):
        processes, micro_batch = rng.choice([layout for layout in layouts if layout not in used[-1:]])
        used.append((processes, micro_batch))
        launch = world.start(trainer, folder, processes, micro_batch=micro_batch)
        enough = count_steps(folder) + rng.randint(2, 9)
        if stop is not None:
            until(lambda running=launch, steps=enough: count_steps(folder) >= steps or running.ended(), 60)
            launch.kill() if stop == signal.SIGKILL else launch.send(stop)
        codes = set(launch.wait())
        assert codes <= {EXIT_STOPPED, -signal.SIGKILL} or codes == {0}, launch.said()
        if codes == {0}:
            break
    found, same = whole(folder), expected.result
    assert found["ledger"] == same["ledger"], f"{folder}: other examples than one process has"
    return {"trainer": trainer, "layouts": used, "loss_off": loss_off(found["train"], same["train"])}


def count_steps(folder: Path) -> int:
    """Steps in the ledger."""
    path = folder / "logs/ledger.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def loss_off(found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of two logs' losses, which must be within the tolerance; their steps must be the same."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True))
    assert off < LOSS_TOLERANCE, f"losses differ by {off}"
    return off


# Damage


def harms(size: int) -> dict[str, Callable[[bytes], bytes]]:
    """What can happen to the bytes of a file: a bit flipped here or there, an end lost, bytes too many."""
    flips = {f"flip at {at}": functools.partial(flip, at=at) for at in sorted({0, size // 3, size // 2, size - 1})}
    cuts = {f"cut to {keep}": functools.partial(cut, keep=keep) for keep in sorted({0, size // 2, size - 1})}
    return flips | cuts | {"longer": lambda content: content + b"\0"}


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def cut(content: bytes, keep: int) -> bytes:
    return content[:keep]


def damages(folder: Path) -> list[tuple[str, str]]:
    """Every harm to every file of a folder, as (file, harm)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [
        (str(path.relative_to(folder)), harm)
        for path in files
        for harm in ["missing", *(harms(path.stat().st_size) if path.stat().st_size else {})]
    ]


def do_harm(path: Path, harm: str) -> None:
    """Damage one file."""
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(harms(len(content))[harm](content))


def interrupted(world: World, trainer: str) -> Path:
    """A run of one process that was stopped between its second and its last checkpoint; not to be changed."""
    folder = world.folder / "interrupted" / trainer
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        launch = world.start(trainer, folder)
        assert until(lambda: count_steps(folder) >= 13 or launch.ended(), 60), launch.said()
        launch.send(signal.SIGTERM)
        assert launch.wait() == [EXIT_STOPPED], launch.said()
    return folder


def damaged_checkpoint(world: World, trainer: str, name: str, harm: str, folder: Path) -> Detail:
    """One file of the newest checkpoint is damaged: it is named, the one before is used, and nothing is deleted."""
    shutil.copytree(interrupted(world, trainer), folder)
    newest = newest_of(folder)
    do_harm(newest / name, harm)
    left = content_of(newest)
    launch = world.start(trainer, folder)
    assert launch.wait() == [0], launch.said()
    said = launch.said()
    assert f"{newest} is damaged" in said, said
    assert name in said.partition(f"{newest} is damaged")[2].partition("passing over")[0], said
    aside = newest.with_name(f"{newest.name}.damaged_1")
    assert content_of(aside) == left, f"{aside} is not what was damaged"
    check_same(folder, world.undisturbed(trainer).result)
    return {"trainer": trainer, "file": name, "harm": harm}


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Data(NamedTuple):
    """A folder that a trainer reads."""

    trainer: str
    argument: str
    folder: str  # in the world


DATA = {
    "papers": Data("train", "data_dir", "papers"),
    "held-out examples": Data("pptrain", "data_dir", "stages_splits"),
    "examples to mix in": Data("pretrain", "data_dir", "mixin_splits"),
    "pack": Data("pretrain", "c4_dir", "pack"),
}


def damaged_data(world: World, kind: str, name: str, harm: str, verify: bool, folder: Path) -> Detail:
    """One file of the data is damaged: the run names it and does not begin.

    Without --verify_data, a byte that changed in tokens.bin is not looked for, and one in a shard only when the shard is read.
    """
    trainer, argument, source = DATA[kind]
    data = folder / source
    shutil.copytree(world.folder / source, data)
    do_harm(data / name, harm)
    changes = {"verify_data": verify} if trainer != "pptrain" else {}
    launch = world.start(trainer, folder / "run", **{argument: data}, **changes)
    code, said = launch.wait()[0], launch.said()
    if code == 0 and not verify and harm.startswith("flip"):  # of what is not looked at unless it is asked for
        assert name == "tokens.bin" or name.startswith("shard_"), f"{name} {harm}: {said}"
        if name != "tokens.bin":
            check_same(folder / "run", world.undisturbed(trainer).result)  # a shard that was not read
        return {"kind": kind, "file": name, "harm": harm, "verify": verify, "refused": False}
    assert code == 1, f"{name} {harm}: code {code}: {said}"
    error = said.rpartition("Error: ")[2]
    assert name in error, f"{name} {harm}: {said}"
    trained = count_steps(folder / "run")
    assert not trained or (not verify and name.startswith("shard_") and harm.startswith("flip")), f"{trained} steps"
    return {"kind": kind, "file": name, "harm": harm, "verify": verify, "refused": True, "steps_before": trained}


# Numbers that are not finite


@dataclass(frozen=True)
class Poison:
    """In one of the processes, from a data step's first attempt on, `times` attempts are not finite."""

    process: int
    data_step: int
    times: int
    value: str  # nan, inf
    where: str  # loss, gradient

    def __call__(self) -> None:
        import torch

        import lm.session

        if int(os.environ.get("RANK", 0)) != self.process:
            return
        clean_step, clean, left = lm.session.train_step, lm.session.Session.make_step, [self.times]
        current: list[int] = []

        def make_step(session, *rest):
            current[:] = [session.progress.data_step]
            return clean(session, *rest)

        def train_step(accelerator, model, optimizer, micro_batches, loss_sum, *rest):
            if current != [self.data_step] or not left[0]:
                return clean_step(accelerator, model, optimizer, micro_batches, loss_sum, *rest)
            left[0] -= 1
            bad = float(self.value)
            if self.where == "loss":

                def poisoned(model, batch):
                    loss, *others = loss_sum(model, batch)
                    return loss * bad, *others

                return clean_step(accelerator, model, optimizer, micro_batches, poisoned, *rest)
            parameters = [p for p in model.parameters() if p.requires_grad]
            hook = parameters[len(parameters) // 2].register_hook(lambda grad: torch.full_like(grad, bad))
            try:
                return clean_step(accelerator, model, optimizer, micro_batches, loss_sum, *rest)
            finally:
                hook.remove()

        lm.session.Session.make_step, lm.session.train_step = make_step, train_step


def poisoned(world: World, rng: random.Random, folder: Path, trainer: str = "", where: str = "", times: int = 0) -> Detail:
    """NaN or inf in the loss or a gradient of one process: up to twice nothing changes; three times, a stretch is left out."""
    trainer, processes = trainer or rng.choice(TRAINERS), 2
    expected = world.undisturbed(trainer, processes)
    steps = expected.result["ledger"].count("\n")
    poison = Poison(
        process=rng.randrange(processes),
        data_step=rng.randrange(steps),
        times=times or rng.choice((1, 2, 3, 3)),
        value=rng.choice(("nan", "inf")),
        where=where or rng.choice(("loss", "gradient")),
    )
    launch = world.start(trainer, folder, processes, before=poison)
    assert launch.wait() == [0] * processes, launch.said()
    faults = [event for event in events(folder) if event["event"] == "not_finite"]
    assert [event["data_step"] for event in faults] == [poison.data_step] * poison.times, faults
    if poison.where == "loss":
        assert all(f"on process {poison.process}" in event["faults"][0] for event in faults), faults
    back = [event for event in events(folder) if event["event"] == "rolled_back"]
    if poison.times < 3:
        assert not back
        check_same(folder, expected.result)
    else:
        start = poison.data_step - poison.data_step % 5  # a checkpoint every five steps
        left_out = [start, poison.data_step]
        assert [event["data_steps_left_out"] for event in back] == [left_out], back
        name = f"_without_{start}_{poison.data_step}"
        stepping_over = functools.partial(step_over, world, trainer, processes, start, poison.data_step + 1 - start)
        check_same(folder, world.undisturbed(trainer, processes, name, stepping_over).result)
    return {"trainer": trainer, **poison.__dict__, "rolled_back": bool(back)}


def step_over(world: World, trainer: str, processes: int, start: int, stretch: int, folder: Path) -> None:
    """Make a run that stands at step `start` and whose next step's data lie `stretch` steps further on."""
    launch = world.start(trainer, folder, processes, max_step_checkpoints=100)
    assert launch.wait() == [0] * processes, launch.said()
    shutil.rmtree(folder / "final")
    checkpoints = Checkpoints(folder / "checkpoints", 100)
    for path in checkpoints.paths():
        if int(path.name[5:]) > start:
            shutil.rmtree(path)
    path = folder / f"checkpoints/step_{start:08d}"
    change_state(path, {"data_offset": stretch} | drawn(world, trainer, start + stretch))


def drawn(world: World, trainer: str, data_step: int) -> dict[str, int]:
    """What pretrain.py has drawn before this data step."""
    if trainer != "pretrain":
        return {}
    options = world.options(trainer)
    rows = MixedRows(None, [], None, 0, options["mixin_percent"])
    blocks, examples = rows.drawn(data_step * options["effective_batch"])
    return {"c4_block_idx": blocks, "mixin_idx": examples}


def change_state(path: Path, changes: dict[str, Any]) -> None:
    """Rewrite state.json of a checkpoint, and what the manifest says of it."""
    from lm.files import read_sealed, sha256, write_json, write_sealed

    state, manifest = path / "state.json", read_sealed(path / "manifest.json", "a trainer")
    write_json(state, json.loads(state.read_text()) | changes)
    manifest["files"]["state.json"] = {"size": state.stat().st_size, "sha256": sha256(state)}
    write_sealed(path / "manifest.json", manifest)


# A full disk


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A disk of this size."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small disk."""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError), small_disk(folder / "probe", 1):
        return True
    return False


def disk_full(world: World, rng: random.Random, folder: Path, trainer: str = "", filled: bool | None = None) -> Detail:
    """The disk of a run is full from the beginning or from a random moment on: a clear error, and room is all it needs."""
    trainer = trainer or rng.choice(TRAINERS)
    expected = world.undisturbed(trainer)
    filled = rng.random() < 0.5 if filled is None else filled
    size = 64 if filled else rng.uniform(0.1, 6)
    with small_disk(folder / "disk", size) as disk:
        run = disk / "run"
        launch = Launch(f"{trainer}.py", world.options(trainer) | {"output_dir": run}, folder / "out")
        if filled:
            until(launch.ended, rng.random() * expected.seconds)
            fill(disk / "filler")
        code, said = launch.wait()[0], launch.said()
        check_checkpoints(run)
        if code != 0:
            assert code == 1, said
            assert "make room" in said, said
        failed_at = count_steps(run)
        (disk / "filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=128m", disk], check=True)
        launch = Launch(f"{trainer}.py", world.options(trainer) | {"output_dir": run}, folder / "out")
        assert launch.wait() == [0], launch.said()
        check_same(run, expected.result)
    return {"trainer": trainer, "filled": filled, "megabytes": round(size, 2), "failed": code != 0, "steps_before": failed_at}


def fill(path: Path) -> None:
    """Take all the room there is."""
    with contextlib.suppress(OSError), open(path, "wb") as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                for _ in itertools.count():
                    file.write(b"\1" * size)
                    file.flush()


def packing_disk_full(world: World, rng: random.Random, folder: Path) -> Detail:
    """The disk of a pack is full somewhere on the way: a clear error, what is published is whole, and room is all it needs."""
    size = rng.uniform(0.02, 0.5)
    with small_disk(folder / "disk", size) as disk:
        launch = start_packing(world, disk / "pack", folder / "out")
        code, said = launch.wait()[0], launch.said()
        if code != 0:
            assert code == 1, said
            assert "disk is full" in said, said
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        launch = start_packing(world, disk / "pack", folder / "out")
        assert launch.wait() == [0], launch.said()
        assert shards_of(disk / "pack") == shards_of(packed(world))
    return {"megabytes": round(size, 3), "failed": code != 0}


def start_packing(world: World, folder: Path, out: Path) -> Launch:
    """build_pretrain.py on a few hundred real documents, in shards of about 100 kB."""
    if not (world.folder / "documents.jsonl").exists():
        lines = [json.dumps({"text": document}) + "\n" for document in documents()]
        (world.folder / "documents.jsonl").write_text("".join(lines))
    options = {"scratch_dir": world.folder, "documents": world.folder / "documents.jsonl", "seq_len": 192, "num_workers": 1}
    options |= {"tokenizer": world.folder / "tokenizer", "held_out_blocks": 8, "blocks_per_shard": 256}
    return Launch("build_pretrain.py", options | {"output_dir": folder}, out)


def packed(world: World) -> Path:
    """The same pack, undisturbed."""
    folder = world.folder / "packed"
    if not (folder / "meta.json").exists():
        launch = start_packing(world, folder, world.folder / "packed.out")
        assert launch.wait() == [0], launch.said()
    return folder


def shards_of(pack: Path) -> dict[str, bytes]:
    """The bytes of a finished pack."""
    return {path.name: path.read_bytes() for path in [*sorted(pack.glob("*.bin")), pack / "meta.json"]}


# S3


S3_FAULTS = ("cut once", "cut always", "server gone", "altered bytes")


def s3_fault(world: World, rng: random.Random, folder: Path, client: Any, fault: str = "") -> Detail:
    """A connection cut once or always, a server gone, altered bytes: tried again, then said; no part taken for the whole."""
    store, bucket = stored_papers(world), f"trial-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    server = os.environ["AWS_ENDPOINT_URL"]
    fault = fault or rng.choice(S3_FAULTS)
    direction = "down" if fault == "altered bytes" else rng.choice(("up", "down"))
    if direction == "down":
        code, said = transfer(world, folder / "sent", bucket, folder / "out", server, upload_to_s3=True)
        assert code == 0, said
    if fault == "altered bytes":
        body = client.get_object(Bucket=bucket, Key="preprocessed_arxiv/tokens.bin")
        content, at = body["Body"].read(), rng.randrange(body["ContentLength"])
        client.put_object(Bucket=bucket, Key="preprocessed_arxiv/tokens.bin", Body=flip(content, at), Metadata=body["Metadata"])
    limit = rng.randrange(1 << 16, 6 << 20)  # bytes of a connection; a part has 8 MB
    cuts = {"cut once": 1, "cut always": 10**9}.get(fault, 0)
    proxy = CuttingProxy(server, limit, cuts)
    if fault == "server gone":
        proxy.socket.close()
    changes = {"upload_to_s3": True} if direction == "up" else {"download_from_s3": True}
    target = folder / ("sent" if direction == "up" else "taken")
    code, said = transfer(world, target, bucket, folder / "out", proxy.url, **changes)
    proxy.socket.close()
    names = {entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", [])}
    if fault == "cut once":
        assert code == 0, said
        assert proxy.made == 1, "nothing was cut"
    elif direction == "up":
        assert code == 1, said
        assert "check the network" in said, said
        assert "preprocessed_arxiv/meta.json" not in names, "an upload that failed looks finished"
    else:  # it says why, and makes the store here
        assert code == 0, said
        assert "nothing taken from S3, making it here" in said, said
        assert ("SHA-256" if fault == "altered bytes" else "check the network") in said, said
    if direction == "down" or fault == "cut once":
        assert content_of(target) == content_of(store)
    if direction == "up" and fault == "cut once":
        for path in store.rglob("*"):
            if path.is_file():
                key = f"preprocessed_arxiv/{path.relative_to(store)}"
                assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == path.read_bytes()
    for key in names:
        client.delete_object(Bucket=bucket, Key=key)
    return {"fault": fault, "direction": direction, "limit": limit, "cuts": proxy.made}


def stored_papers(world: World) -> Path:
    """A paper store that S3 takes in several parts, made by fetch_arxiv.py."""
    folder = world.folder / "stored"
    if not (folder / "meta.json").exists():
        source = world.folder / "labelled"
        source.mkdir()
        texts = documents()
        for split, count in {"train": 24, "validation": 4, "test": 4}.items():
            rows = [{"text": " ".join(texts[i :: count // 2]) * 12, "label": i % 2} for i in range(count)]
            (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        launch = fetch(world, folder, world.folder / "stored.out")
        assert launch.wait() == [0], launch.said()
    return folder


def fetch(world: World, folder: Path, out: Path, **changes: Any) -> Launch:
    options = {"tokenizer": world.folder / "tokenizer", "full_dataset": True, "output_dir": folder} | changes
    return Launch("fetch_arxiv.py", {"dataset": world.folder / "labelled"} | options, out)


def transfer(world: World, folder: Path, bucket: str, out: Path, url: str, **changes: Any) -> tuple[int, str]:
    """Run fetch_arxiv.py with S3 at this address; an upload is of the finished store."""
    if "upload_to_s3" in changes and not folder.exists():
        shutil.copytree(stored_papers(world), folder)
    out.unlink(missing_ok=True)
    launch = fetch(world, folder, out, s3_bucket=bucket, environment={"AWS_ENDPOINT_URL": url}, **changes)
    return launch.wait(timeout=180)[0], launch.said()


# SLURM


def requeued(world: World, rng: random.Random, folder: Path, cluster: Cluster) -> Detail:
    """A job told that its time is up, put back by hand, or killed outright with its node, ends as if nothing had been."""
    trainer, fault = rng.choice(TRAINERS[1:]), rng.choice(("USR1 before the limit", "scontrol requeue", "node killed"))
    folder.mkdir(parents=True)
    run = folder / "run"
    options = arguments(**world.options(trainer) | {"output_dir": run})
    sbatch = ["sbatch", "--parsable", f"--output={folder}/%j.out", "--cpus-per-task=1", "--nodes=2", "--gres=gpu:1"]
    expected = world.undisturbed(trainer, 2)
    job = cluster.ask(*sbatch, ROOT / f"scripts/{trainer}_job.sh", *options)

    def said() -> str:
        return "".join(path.read_text() for path in folder.glob("*.out"))

    at = rng.randint(3, 20)
    wait_until(lambda: count_steps(run) >= at, 90, said)
    node = cluster.job(job)["BatchHost"]
    if fault == "USR1 before the limit":
        cluster.ask("scancel", "--signal=USR1", "--batch", job)
    elif fault == "scontrol requeue":
        cluster.ask("scontrol", "requeue", job)
    else:
        cluster.fail_node(node)
    try:
        wait_until(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), 180, said)
    finally:
        if fault == "node killed":
            cluster.start_node(node)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), said()
    check_same(run, expected.result)
    return {"trainer": trainer, "fault": fault, "at": at}
