"""Files of a checkpoint or of the data that are damaged, in every way and everywhere."""

import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

from damage import flip
from world import Detail, World, check_same, content_of, count_steps, newest_of, until

from lm.run import EXIT_STOPPED


def harms(size: int) -> list[str]:
    """What can happen to the bytes of a file: a bit flipped here or there, an end lost, a byte too many."""
    if not size:
        return ["missing"]
    flips = [f"flip {at}" for at in sorted({0, size // 3, size // 2, size - 1})]
    cuts = [f"cut to {kept}" for kept in sorted({0, size // 2, size - 2})]  # a last newline says nothing
    return ["missing", *flips, *cuts, "longer"]


def damages(folder: Path) -> list[tuple[str, str]]:
    """Every harm to every file of a folder, as (file, harm)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return [(str(path.relative_to(folder)), harm) for path in files for harm in harms(path.stat().st_size)]


def do_harm(path: Path, harm: str) -> None:
    """Damage one file."""
    match harm.split():
        case ["missing"]:
            path.unlink()
        case ["flip", at]:
            flip(path, int(at))
        case ["cut", "to", size]:
            os.truncate(path, int(size))
        case ["longer"]:
            path.write_bytes(path.read_bytes() + b"\0")


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
