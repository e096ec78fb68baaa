import functools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import safetensors.torch
import torch
from damage import flip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training import TINY, flags, run

import pptrain
import pretrain
import train
from lm.args import parse
from lm.beginning import find_beginning
from lm.checkpoint import NICENESS, Checkpoints, damage, load_checkpoint, read_fields
from lm.files import sha256, write_json, write_sealed
from lm.models import build_model, load_model
from lm.optim import make_optimizer
from lm.recovery import choose_checkpoint


@pytest.fixture
def trained():
    """A model and optimizer after two updates."""
    torch.manual_seed(0)
    model = build_model("neox-64x2", 50, 16)
    optimizer = make_optimizer("adamw", model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    for _ in range(2):
        update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    model(torch.arange(16)[None]).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder, trained, steps, keep=3, state=None):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, *trained, state or {"note": step})
    checkpoints.wait()
    return checkpoints


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [2]).paths()
    torch.manual_seed(9)
    model = build_model("neox-64x2", 50, 16)
    optimizer = make_optimizer("adamw", model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    load_checkpoint(path, model, optimizer)
    assert read_fields(path / "state.json", {"step": int, "note": int}) == {"step": 2, "note": 2}
    for _ in range(2):  # and what is computed from it
        update(model, optimizer)
        update(*trained)
    for mine, theirs in zip(model.parameters(), trained[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert all(torch.equal(optimizer.state[mine][key], trained[1].state[theirs][key]) for key in ("step", "exp_avg_sq"))


def test_saving_copies_the_state_before_it_returns(tmp_path, trained):
    model, optimizer = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints = Checkpoints(tmp_path, 3)
    checkpoints.save(2, model, optimizer, {})
    for parameter in model.parameters():
        parameter.data.zero_()
    checkpoints.wait()
    load_checkpoint(checkpoints.paths()[0], model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_before_the_first_update_has_no_moments(tmp_path):
    model = build_model("neox-64x2", 50, 16)
    optimizer = make_optimizer("adamw", model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    (path,) = saved(tmp_path, (model, optimizer), [0]).paths()
    load_checkpoint(path, model, optimizer)
    assert not optimizer.state


def test_the_newest_are_kept(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [1, 2, 3, 10], keep=2)
    assert [path.name for path in checkpoints.paths()] == ["step_00000003", "step_00000010"]
    assert checkpoints.newest_good().name == "step_00000010"


def test_a_kill_while_an_old_one_is_removed_leaves_no_half_under_its_name(tmp_path, trained, monkeypatch):
    checkpoints = saved(tmp_path, trained, [1, 2], keep=2)

    def killed(folder):
        (folder / "manifest.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        checkpoints.keep = 1
        with pytest.raises(KeyboardInterrupt):
            checkpoints.prune()
    assert [(path.name, damage(path)) for path in checkpoints.paths()] == [("step_00000002", None)]
    checkpoints.prune()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"], "and the next one clears away"


def test_damaged_ones_are_passed_over_and_kept_for_inspection(tmp_path, trained, capsys):
    checkpoints = saved(tmp_path, trained, [1, 2, 3])
    (tmp_path / "step_00000003" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "step_00000002")
    (tmp_path / "step_00000002").mkdir()
    assert checkpoints.newest_good().name == "step_00000001"
    said = capsys.readouterr().out
    assert f"step_00000003 is damaged ({tmp_path}/step_00000003/model.safetensors has 0 bytes," in said
    assert "step_00000002 is damaged (no " in said
    saved(tmp_path, trained, [3])
    assert damage(tmp_path / "step_00000003") is None
    assert (tmp_path / "step_00000003.damaged_1" / "model.safetensors").read_bytes() == b""


def test_a_good_one_stays_however_many_newer_are_damaged(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [35, 40], keep=2)
    (tmp_path / "step_00000040" / "state.json").write_bytes(b"")
    assert checkpoints.newest_good().name == "step_00000035"
    checkpoints.leave_after(35)  # as a trainer does that goes on from there
    assert [path.name for path in checkpoints.paths()] == ["step_00000035"]
    saved(tmp_path, trained, [37], keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000037", "step_00000040.damaged_1"]


def test_loading_leaves_no_moment_of_before(tmp_path, trained):
    model = build_model("neox-64x2", 50, 16)
    (path,) = saved(tmp_path, (model, make_optimizer("adamw", model, 1e-3, (0.9, 0.95), 1e-6, 0.01)), [0]).paths()
    load_checkpoint(path, *trained)
    assert not trained[1].state


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_write_that_reads_back_damaged_is_an_error_and_replaces_nothing(name, tmp_path, trained, monkeypatch):
    checkpoints = saved(tmp_path, trained, [1])
    checkpoints.save(1, *trained, {"note": "another"})
    checkpoints.wait()

    def forget_a_bit(synced):
        if synced.name == name:
            flip(synced, synced.stat().st_size // 2)

    monkeypatch.setattr("lm.checkpoint._forget", forget_a_bit)
    checkpoints.save(1, *trained, {"note": "a third"})
    with pytest.raises(RuntimeError, match=rf"{name} reads back as something else.*make room or mend"):
        checkpoints.wait()
    assert json.loads((tmp_path / "step_00000001/state.json").read_text())["note"] == "another"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_what_writes_steps_aside_for_training_and_nothing_else_does(tmp_path, trained, monkeypatch):
    found = []

    def noted(path, value):
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        write_json(path, value)

    before = os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr("lm.checkpoint.write_json", noted)
    saved(tmp_path, trained, [1])
    assert found == [NICENESS]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before < NICENESS


def test_a_checkpoint_that_was_being_replaced_when_the_run_was_killed_has_its_name_again(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [1, 2])
    (tmp_path / "step_00000002").rename(tmp_path / ".step_00000002.old")
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000001.old")
    assert choose_checkpoint(checkpoints, "auto").name == "step_00000002"
    assert json.loads((tmp_path / "step_00000002/state.json").read_text())["note"] == 2
    assert json.loads((tmp_path / "step_00000001/state.json").read_text())["note"] == 1


def test_what_a_kill_left_half_written_goes_when_the_next_one_is_whole(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [1])
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".step_00000037.partial")
    checkpoints.save(2, *trained, {})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_link_out_of_a_checkpoint_is_damage(tmp_path, trained):
    (path,) = saved(tmp_path / "run", trained, [1]).paths()
    shutil.move(path / "model.safetensors", tmp_path / "elsewhere")
    (path / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert f"{path}/model.safetensors is a link to {tmp_path}/elsewhere" in damage(path)


def test_a_run_whose_own_checkpoints_are_all_damaged_does_not_begin_at_another_s_again(tmp_path, trained):
    other, own = saved(tmp_path / "other", trained, [5]), saved(tmp_path / "own", trained, [1])
    assert choose_checkpoint(own, str(other.paths()[0])).name == "step_00000001"
    (own.paths()[0] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="every checkpoint in .*own is damaged"):
        choose_checkpoint(own, str(other.paths()[0]))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"format": "checkpoint-9", "files": {}}', b"null"])
def test_a_manifest_that_is_none_is_damage(content, tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    (path / "manifest.json").write_bytes(content)
    assert damage(path) is not None


def test_a_half_written_checkpoint_is_never_seen(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    shutil.copytree(path, tmp_path / ".step_00000002.partial")
    assert [found.name for found in Checkpoints(tmp_path, 3).paths()] == ["step_00000001"]


def test_a_failed_write_is_loud_and_leaves_the_last_good_one(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [1])
    (tmp_path / ".step_00000002.partial").write_text("a file where the folder must go")
    checkpoints.save(2, *trained, {})
    while not checkpoints.failed():
        pass
    with pytest.raises(RuntimeError, match="could not write to .* goes on from the newest good checkpoint"):
        checkpoints.wait()
    assert checkpoints.newest_good().name == "step_00000001"


def test_nothing_is_pickled(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    assert sorted(file.suffix for file in path.iterdir()) == [".json"] * 4 + [".safetensors"] * 2
    assert json.loads((path / "manifest.json").read_text())["format"] == "checkpoint-2"


def reseal(path: Path, **changes) -> None:
    """Write a manifest that agrees with the files that are there, changed like this."""
    files = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in path.iterdir()}
    del files["manifest.json"]
    write_sealed(path / "manifest.json", {"format": "checkpoint-2", "files": files} | changes)


def test_memory_of_a_copy_is_used_again_when_its_write_is_done_and_not_before(tmp_path, trained, monkeypatch):
    model, optimizer = trained
    go, seen = threading.Semaphore(0), []
    write = type(model).save_pretrained

    def slow(self, folder, state_dict):
        seen.append({name: tensor.data_ptr() for name, tensor in state_dict.items()})
        go.acquire()
        write(self, folder, state_dict=state_dict)

    monkeypatch.setattr(type(model), "save_pretrained", slow)
    checkpoints, expected = Checkpoints(tmp_path, 9), {}
    for step in (2, 3, 4, 5):
        if step > 3:
            go.release()  # or the third would wait for the first
        checkpoints.save(step, model, optimizer, {})
        expected[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        update(model, optimizer)  # while both are still to be written
    for _ in range(2):
        go.release()
    checkpoints.wait()
    for path in checkpoints.paths():
        written = load_model(path).state_dict()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected[int(path.name[5:])].items())
    assert seen[0] != seen[1]
    assert seen[2:] == seen[:2]


def test_a_smaller_model_after_a_larger_one_does_not_take_its_memory(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [1])
    small = build_model("neox-64x2", 40, 16)
    checkpoints.save(2, small, make_optimizer("adamw", small, 1e-3, (0.9, 0.95), 1e-6, 0.01), {})
    checkpoints.wait()
    written = load_model(checkpoints.paths()[-1]).state_dict()
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in small.state_dict().items()
    }
    assert safetensors.torch.load_file(checkpoints.paths()[-1] / "optimizer.safetensors") == {}


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), KeyError("a bug"), safetensors.SafetensorError("a bad tensor"), SystemExit(3)]
)
def test_whatever_ends_a_write_is_loud_even_when_a_later_one_succeeds(error, tmp_path, trained, monkeypatch):
    checkpoints = saved(tmp_path, trained, [1])

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        checkpoints.save(2, *trained, {})
        while not checkpoints.failed():
            pass
    for step in (3, 4):
        checkpoints.save(step, *trained, {})
    assert checkpoints.failed()
    with pytest.raises(RuntimeError, match=f"could not write to .*{error.args[0]}.*run the same command again") as raised:
        checkpoints.wait()
    assert raised.value.__cause__ is error
    assert [path.name[-1] for path in checkpoints.paths()] == ["1", "3", "4"]
    assert not checkpoints.failed()


def test_a_failed_write_ends_every_process_at_the_next_step(papers_dir, tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(
        "import safetensors.torch, train\n"
        "from lm.args import parse\n"
        "from lm.run import run_and_exit\n"
        "write = safetensors.torch.save_file\n"
        "def save_file(tensors, *rest):\n"
        "    if float(next((v for k, v in tensors.items() if k.endswith('/step')), 0)) == 10:\n"
        "        raise MemoryError('none is left')\n"
        "    write(tensors, *rest)\n"
        "safetensors.torch.save_file = save_file\n"
        "run_and_exit(train.main, parse(train.Args))\n"
    )
    folder = tmp_path / "run"
    assert run(folder, papers_dir, processes=2, script=script) == 1
    said = Path(f"{folder}.out").read_text()
    assert "(none is left): see above for what failed, then run the same command again" in said
    assert "RuntimeError: the main process could not write a checkpoint: its message says why" in said
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names - {"step_00000015"} == {"step_00000000", "step_00000005"}
    last = json.loads((folder / "logs/train.jsonl").read_text().splitlines()[-1])["step"]
    assert 10 <= last <= 20, "the save at 20 waits for the write at 10"


ENTRY = {"size": 1, "sha256": "0" * 64}
OUTSIDE = "a file inside the folder is needed"


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({}, "manifest.json names {}, files are needed"),
        (None, "manifest.json names None, files are needed"),
        ([], "manifest.json names [], files are needed"),
        ({"config.json": None}, "config.json is None, an object is needed"),
        ({"config.json": {"size": True, "sha256": ""}}, "config.json has size True, int is needed"),
        ({"config.json": {"size": 1.0, "sha256": ""}}, "config.json has size 1.0, int is needed"),
        ({"config.json": {"size": -1, "sha256": ""}}, "config.json has size -1, 0 to"),
        ({"config.json": {"size": 1, "sha256": 0}}, "config.json has sha256 0, str is needed"),
        ({"config.json": {"size": 1}}, "config.json has sha256 None, str is needed"),
        ({"../step_00000001/config.json": ENTRY}, OUTSIDE),
        ({"/etc/passwd": ENTRY}, OUTSIDE),
        ({".": ENTRY}, OUTSIDE),
        ({"": ENTRY}, OUTSIDE),
        ({"a\0b": ENTRY}, OUTSIDE),
        ({"a" * 300: ENTRY}, OUTSIDE),
        ({"other.json": ENTRY}, "other.json is missing"),
    ],
)
def test_a_sealed_manifest_of_strange_files_is_damage(files, fault, tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    reseal(path, files=files)
    assert fault in damage(path)


def test_a_manifest_that_is_huge_or_nested_is_damage(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    (path / "manifest.json").write_text("[" * 100_000)
    assert "nested too deeply" in damage(path)
    with open(path / "manifest.json", "wb") as file:
        file.truncate(2**40)  # takes no room, and would not fit into memory
    assert damage(path) == f"manifest.json has {2**40} bytes, no more than 1048576 are believed"


def test_a_file_that_was_not_written_with_the_rest_is_damage(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    (path / ".nfs0000001").write_text("a file system's own")
    assert damage(path) is None
    (path / "adapter_config.json").write_text("{}")
    assert damage(path) == "adapter_config.json is not in manifest.json, so it was not written with the rest: move it elsewhere"


def test_only_folders_with_a_number_are_checkpoints(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [2])
    for name in ("step_\u00b2", "step_", "step_x", "step_99999999", "step_100000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_3").write_text("a file")
    assert [path.name for path in checkpoints.paths()] == ["step_00000002", "step_99999999", "step_100000000"]


def misfit(tensors: dict[str, torch.Tensor], **changes) -> dict[str, torch.Tensor]:
    """The same tensors but for some, where None takes one away."""
    return {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}


BIAS = "gpt_neox.final_layer_norm.bias"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({f"{BIAS}/exp_avg": None}, f"{BIAS} has the moments exp_avg_sq, step, exp_avg, exp_avg_sq, step are needed"),
        ({f"{BIAS}/{moment}": None for moment in ("exp_avg", "exp_avg_sq", "step")}, f"those of {BIAS}"),
        ({"elsewhere/exp_avg": torch.zeros(3)}, "those of elsewhere"),
        ({"elsewhere": torch.zeros(3)}, "does not fit the model"),
        ({f"{BIAS}/third": torch.zeros(64)}, "has the moments exp_avg, exp_avg_sq, step, third"),
        ({f"{BIAS}/exp_avg": torch.zeros(63)}, f"{BIAS}/exp_avg has shape (63,) and torch.float32, (64,)"),
        ({f"{BIAS}/exp_avg": torch.zeros(())}, f"{BIAS}/exp_avg has shape ()"),
        ({f"{BIAS}/step": torch.zeros(64)}, f"{BIAS}/step has shape (64,)"),
        ({f"{BIAS}/exp_avg": torch.zeros(64, dtype=torch.float16)}, f"{BIAS}/exp_avg has shape (64,) and torch.float16"),
    ],
)
def test_moments_of_another_model_are_refused_before_anything_changes(changes, fault, tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    model, optimizer = trained
    update(model, optimizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = path / "optimizer.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        about = opened.metadata()
    safetensors.torch.save_file(misfit(safetensors.torch.load_file(file), **changes), file, about)
    reseal(path)
    assert damage(path) is None
    with pytest.raises(ValueError, match=re.escape(fault)) as raised:
        load_checkpoint(path, model, optimizer)
    assert str(raised.value).startswith(f"{file} does not fit the model (")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({BIAS: None}, f"lacks the weights {BIAS}"),
        ({"elsewhere": torch.zeros(3)}, "has the weights elsewhere, which the model has not"),
        ({BIAS: torch.zeros(63)}, f"{BIAS} (63,), not (64,)"),
        ({BIAS: torch.zeros(64, dtype=torch.float16)}, f"has {BIAS} in F16, F32 is needed"),
    ],
)
def test_weights_of_another_model_are_refused(changes, fault, tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    file = path / "model.safetensors"
    safetensors.torch.save_file(misfit(safetensors.torch.load_file(file), **changes), file, {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(fault)):
        load_checkpoint(path, *trained)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no tensors", b"\xff" * 64])
def test_a_file_that_holds_no_tensors_is_refused(name, content, tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    (path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer.safetensors cannot be read|step_00000001 cannot be loaded"):
        load_checkpoint(path, *trained)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [1]).paths()
    other = build_model("neox-64x2", 65, 16)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(path, other, make_optimizer("adamw", other, 1e-3, (0.9, 0.95), 1e-6, 0.01))


def test_moments_that_a_parameter_never_had_are_not_asked_for(tmp_path, trained):
    model, optimizer = trained
    del optimizer.state[model.gpt_neox.final_layer_norm.bias]  # as of one that no gradient reached
    (path,) = saved(tmp_path, trained, [1]).paths()
    load_checkpoint(path, model, optimizer)
    assert len(optimizer.state) == len(list(model.parameters())) - 1


@pytest.fixture
def stopped(papers_dir, tmp_path):
    """A function that goes on with a run of train.py of two steps in this process, and the folder of its newest checkpoint."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    settings = TINY | {"data_dir": papers_dir, "token_budget": 576, "output_dir": tmp_path / "run"}
    go = functools.partial(train.main, parse(train.Args, flags(**settings, force_cpu=True)))
    go()
    yield go, tmp_path / "run/checkpoints/step_00000002"
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_a_state_that_is_none_is_refused_naming_file_and_field(stopped):
    go, path = stopped
    state = json.loads((path / "state.json").read_text())
    for change, fault in [
        ({"step": "2"}, "state.json has step '2', int is needed"),
        ({"step": True}, "has step True, int is needed"),
        ({"step": -1}, f"has step -1, 0 to {2**48 - 1} is needed"),
        ({"step": 2.0}, "has step 2.0, int is needed"),
        ({"step": 2**63}, f"has step {2**63}, 0 to {2**48 - 1} is needed"),
        ({"data_offset": None}, "has data_offset None, int is needed"),
        ({"val_losses": {}}, "has val_losses {}, list[float] is needed"),
        ({"val_losses": ["1"]}, "has val_losses ['1'], list[float] is needed"),
        ({"loss_scale": 3}, "has loss_scale 3, dict[str, float] | None is needed"),
        ({"loss_scale": {}}, "loss_scale {}, of another --precision"),
        ({"identity": []}, "has identity [], dict is needed"),
        (dict.fromkeys(state), "has identity None, dict is needed"),
    ]:
        write_json(path / "state.json", state | change)
        reseal(path)
        with pytest.raises(ValueError, match=re.escape(f"{path}/state.json")) as raised:
            go()
        assert fault in str(raised.value)
    for content, fault in [
        ([], "is [], an object is needed"),
        ({}, "has identity None"),
        ({"identity": state["identity"]}, "has step None"),
    ]:
        write_json(path / "state.json", content)
        reseal(path)
        with pytest.raises(ValueError, match=re.escape(f"{path}/state.json")) as raised:
            go()
        assert fault in str(raised.value)
    write_json(path / "state.json", state)
    reseal(path)
    assert go() == 0


# Fuzzing: whatever bytes or JSON stand in a file, there is an answer or an error that names the file.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def mutated(draw, value: Any) -> Any:
    """A JSON value with one part of it replaced, removed or added."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {name: part for name, part in value.items() if name != key}
        how = draw(st.sampled_from(["inside", "remove", "rename"]))
        if how == "remove":
            return rest
        return rest | ({draw(st.text()): value[key]} if how == "rename" else {key: draw(mutated(value[key]))})
    return draw(JSON)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One good checkpoint, for tests that put back what they change."""
    torch.manual_seed(0)
    model = build_model("neox-64x2", 50, 16)
    state = {
        "data_offset": 0,
        "pptrain_checkpoint": "/a",
        "since": {"a": 0.5},
        "recent": [True],
        "identity": {"initial_weights": "b"},
    }
    optimizer = make_optimizer("adamw", model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    return saved(tmp_path_factory.mktemp("good"), (model, optimizer), [3], state=state).paths()[0]


def fuzzed(good: Path, name: str):
    """Strategies for the content of one of its JSON files: any bytes, any JSON, its own JSON changed in one place."""
    content = (good / name).read_bytes()
    cut = st.integers(0, len(content) - 1)
    flipped = st.tuples(cut, st.integers(1, 255)).map(
        lambda at: content[: at[0]] + bytes([content[at[0]] ^ at[1]]) + content[at[0] + 1 :]
    )
    return st.binary() | cut.map(lambda end: content[:end]) | flipped


def answer(make: Callable[[], Any]) -> tuple[Any, str]:
    """What is made, or None and the message of the ValueError or FileNotFoundError that is raised instead."""
    try:
        return make(), ""
    except (ValueError, FileNotFoundError) as error:
        return None, str(error)


def test_any_manifest_is_good_or_damage(good):
    file, original = good / "manifest.json", (good / "manifest.json").read_bytes()
    manifest = {name: value for name, value in json.loads(original).items() if name != "sha256"}
    as_json = JSON.filter(lambda value: not isinstance(value, dict))

    @FUZZ
    @given(content=fuzzed(good, "manifest.json") | as_json.map(lambda value: json.dumps(value).encode()))
    def raw(content):
        file.write_bytes(content)
        fault = damage(good)
        assert isinstance(fault, str) == (content != original)

    @FUZZ
    @given(value=mutated(manifest).filter(lambda value: isinstance(value, dict)))
    def sealed(value):
        write_sealed(file, value)
        fault = damage(good)
        assert isinstance(fault, str) or {**value, "sha256": None}.items() >= manifest.items()

    try:
        raw()
        sealed()
    finally:
        file.write_bytes(original)
    assert damage(good) is None


@pytest.mark.parametrize("trainer", [train, pptrain, pretrain])
def test_any_state_is_of_the_kinds_of_the_trainers_progress_or_refused(good, trainer):
    file, original = good / "state.json", (good / "state.json").read_bytes()
    kinds = get_type_hints(trainer.Progress)
    whole = {"loss_scale": None, "identity": {"initial_weights": "b"}} | vars(trainer.Progress())

    @FUZZ
    @given(content=fuzzed(good, "state.json") | mutated(whole).map(lambda value: json.dumps(value).encode()))
    def law(content):
        file.write_bytes(content)
        reseal(good)
        assert damage(good) is None
        progress, fault = answer(lambda: trainer.Progress(**read_fields(file, kinds)))
        if progress is None:
            assert fault.startswith(str(file))
        else:
            assert type(progress.step) is type(progress.data_offset) is int
            assert progress.data_step >= progress.step >= 0
            assert all(type(flag) is bool for flag in getattr(progress, "recent", []))
            assert all(math.isfinite(loss) for loss in getattr(progress, "val_losses", []))
        began, fault = answer(lambda: find_beginning("/a", good.parent, good))
        if began is None:
            assert fault.startswith((str(file), "no model in /a"))
        else:
            assert began.path is None or type(began.path) is type(began.sha256) is str

    try:
        law()
    finally:
        file.write_bytes(original)
        reseal(good)
