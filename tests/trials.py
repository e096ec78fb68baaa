"""Runs that are killed, stopped, moved to other processes and poisoned: each trial raises if a promise is broken.

More are in trials_damage.py and trials_outside.py. tests/test_faults.py makes a few of each, benchmarks/faults.py any number. A
trial draws all of its choices from `rng`, works in `folder`, and returns what it did.
"""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from damage import list_again
from training import events
from world import TRAINERS, Detail, World, check_checkpoints, check_same, count_events, count_steps, newest_of, until, whole

from lm.checkpoint import Checkpoints
from lm.files import write_json
from lm.mixed_rows import MixedRows
from lm.run import EXIT_STOPPED

LOSS_TOLERANCE = 1e-4  # relative, between runs on different numbers of processes: float addition in another order
WEIGHT_TOLERANCE = 1e-3  # Adam makes much of the sign of a gradient that is nearly zero

# SIGKILL


def killed(
    world: World, rng: random.Random, folder: Path, trainer: str = "", processes: int = 0, where: str = "", most: int = 12
) -> Detail:
    """SIGKILL at a random moment, or in the midst of writing a checkpoint, once to `most` times, until the run is done."""
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
            if kills:
                break
            shutil.rmtree(folder)  # it was faster
            continue
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
        at = rng.randint(0, expected.result["ledger"].count("\n") - 1)
        until(lambda running=launch, steps=at: count_steps(folder) >= steps or running.ended(), 60)
        time.sleep(rng.random() * 0.03)
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
    off = {"loss_off": loss_off(found["train"], same["train"]), "weights_off": weights_off(folder, expected.folder)}
    return {"trainer": trainer, "layouts": used, "resumes": len(used) - 1, **off}


def loss_off(found: list[dict], expected: list[dict]) -> float:
    """The largest relative difference of two logs' losses, which must be within the tolerance; their steps must be the same."""
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found, expected, strict=True))
    assert off < LOSS_TOLERANCE, f"losses differ by {off}"
    return off


def weights_off(folder: Path, other: Path) -> float:
    """The largest difference of final weights, relative to the largest of a tensor; it must be within the tolerance."""
    found, expected = (safetensors.torch.load_file(run / "final/model.safetensors") for run in (folder, other))
    off = max(((found[name] - value).abs().max() / value.abs().max()).item() for name, value in expected.items())
    assert off < WEIGHT_TOLERANCE, f"weights differ by {off}"
    return off


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
        import lm.session
        from lm.fsdp import local

        if int(os.environ.get("RANK", 0)) != self.process:
            return
        clean_step, clean, left = lm.session.train_step, lm.session.Session.make_step, [self.times]
        meant: list[object] = []  # the micro-batches of that step, which may be attempted again much later

        def make_step(session, micro_batches, *rest, **how):
            if session.progress.data_step == self.data_step:
                meant[:] = [micro_batches]
            return clean(session, micro_batches, *rest, **how)

        def train_step(accelerator, model, optimizer, micro_batches, loss_sum, *rest):
            if not any(micro_batches is its for its in meant) or not left[0]:
                return clean_step(accelerator, model, optimizer, micro_batches, loss_sum, *rest)
            left[0] -= 1
            bad = float(self.value)
            if self.where == "loss":

                def poisoned(model, batch):
                    loss, *others = loss_sum(model, batch)
                    return loss * bad, *others

                return clean_step(accelerator, model, optimizer, micro_batches, poisoned, *rest)
            parameters, backward = list(model.parameters()), accelerator.backward

            def then_poison(loss):
                backward(loss)
                local(parameters[len(parameters) // 2].grad).fill_(bad)

            accelerator.backward = then_poison
            try:
                return clean_step(accelerator, model, optimizer, micro_batches, loss_sum, *rest)
            finally:
                accelerator.backward = backward

        lm.session.Session.make_step, lm.session.train_step = make_step, train_step


def poisoned(
    world: World,
    rng: random.Random,
    folder: Path,
    trainer: str = "",
    where: str = "",
    times: int = 0,
    then_killed: bool | None = None,
) -> Detail:
    """NaN or inf in the loss or a gradient of one process: up to twice nothing changes; three times, a stretch is left out.

    Also if the run is killed as soon as it says so, and the fault does not come again.
    """
    trainer, processes = trainer or rng.choice(TRAINERS), 2
    then_killed = rng.random() < 0.5 if then_killed is None else then_killed
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
    if then_killed and poison.times == 3:
        until(lambda: count_events(folder, "rolled_back") or launch.ended(), 60)
        launch.kill()
        check_checkpoints(folder)
        launch = world.start(trainer, folder, processes)
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
    return {"trainer": trainer, **poison.__dict__, "rolled_back": bool(back), "then_killed": then_killed and bool(back)}


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
    state = json.loads((path / "state.json").read_text())
    write_json(path / "state.json", state | {"data_offset": stretch} | drawn(world, trainer, start + stretch))
    list_again(path, "state.json", within="manifest.json")


def drawn(world: World, trainer: str, data_step: int) -> dict[str, int]:
    """What pretrain.py has drawn before this data step."""
    if trainer not in ("pretrain", "fsdp"):
        return {}
    options = world.options(trainer)
    rows = MixedRows(None, [], None, 0, options["mixin_percent"])
    blocks, examples = rows.drawn(data_step * options["effective_batch"])
    return {"c4_block_idx": blocks, "mixin_idx": examples}
