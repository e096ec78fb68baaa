import json
import shutil

import pytest
import torch

from lm.checkpoint import Checkpoints, damage, load_checkpoint
from lm.models import build_model
from lm.optim import adamw


@pytest.fixture
def trained():
    """A model and optimizer after two updates."""
    torch.manual_seed(0)
    model = build_model("neox-64x2", 50, 16)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    for _ in range(2):
        update(model, optimizer)
    return model, optimizer


def update(model, optimizer):
    model(torch.arange(16)[None]).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder, trained, steps, keep=3):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, *trained, {"note": step})
    checkpoints.wait()
    return checkpoints


def test_what_is_loaded_is_what_was_saved_bit_for_bit(tmp_path, trained):
    (path,) = saved(tmp_path, trained, [2]).paths()
    torch.manual_seed(9)
    model = build_model("neox-64x2", 50, 16)
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    assert load_checkpoint(path, model, optimizer) == {"step": 2, "note": 2}
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
    optimizer = adamw(model, 1e-3, (0.9, 0.95), 1e-6, 0.01)
    (path,) = saved(tmp_path, (model, optimizer), [0]).paths()
    load_checkpoint(path, model, optimizer)
    assert not optimizer.state


def test_the_newest_are_kept(tmp_path, trained):
    checkpoints = saved(tmp_path, trained, [1, 2, 3, 10], keep=2)
    assert [path.name for path in checkpoints.paths()] == ["step_00000003", "step_00000010"]
    assert checkpoints.newest_good().name == "step_00000010"


def test_damaged_ones_are_passed_over_and_kept_for_inspection(tmp_path, trained, capsys):
    checkpoints = saved(tmp_path, trained, [1, 2, 3])
    (tmp_path / "step_00000003" / "model.safetensors").write_bytes(b"")
    shutil.rmtree(tmp_path / "step_00000002")
    (tmp_path / "step_00000002").mkdir()
    assert checkpoints.newest_good().name == "step_00000001"
    said = capsys.readouterr().out
    assert "step_00000003 is damaged (model.safetensors has 0 bytes," in said
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
    (path,) = saved(tmp_path, (model, adamw(model, 1e-3, (0.9, 0.95), 1e-6, 0.01)), [0]).paths()
    load_checkpoint(path, *trained)
    assert not trained[1].state


def test_a_write_that_reads_back_damaged_is_an_error(tmp_path, trained, monkeypatch):
    monkeypatch.setattr("lm.checkpoint.damage", lambda path: "a disk that forgets")
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(1, *trained, {})
    with pytest.raises(RuntimeError, match="reads back damaged .a disk that forgets."):
        checkpoints.wait()


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
    assert json.loads((path / "manifest.json").read_text())["format"] == "checkpoint-1"
