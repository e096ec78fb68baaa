"""What a run survives: a few trials of each fault, which `python -m benchmarks.faults` makes by the hundred (see trials.py)."""

import random

import pytest
from trials import killed, poisoned, resized, signalled
from trials_damage import DATA, damaged_checkpoint, damaged_data, damages, interrupted
from trials_outside import S3_FAULTS, can_mount, disk_full, packing_disk_full, s3_fault
from world import TRAINERS, World, newest_of

CHECKPOINT_FILES = ("config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults") / "world")


@pytest.fixture
def rng(request):
    """Another one for each test, the same each time."""
    return random.Random(request.node.name)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def needs_a_small_disk(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("mounting a small disk needs root")


@pytest.mark.parametrize("where", ["anywhere", "in a checkpoint write"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_run_killed_again_and_again_ends_bit_for_bit_as_if_it_had_not_been(trainer, processes, where, world, rng, folder):
    assert killed(world, rng, folder, trainer, processes, where, most=3)["kills"]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_signal_stops_all_with_a_checkpoint_and_exit_code_75(trainer, processes, world, rng, folder):
    assert signalled(world, rng, folder, trainer, processes)["stops"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_any_number_of_processes_goes_on_with_the_same_examples(trainer, world, rng, folder):
    assert len(resized(world, rng, folder, trainer)["layouts"]) > 1


@pytest.mark.parametrize("harm", ["flip", "cut", "missing"])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_damaged_file_of_the_newest_checkpoint_is_named_and_the_one_before_used(name, harm, world, rng, folder):
    trainer = rng.choice(("train", "pptrain", "pretrain"))
    harms = [found for file, found in damages(newest_of(interrupted(world, trainer))) if file == name]
    damaged_checkpoint(world, trainer, name, rng.choice([found for found in harms if found.startswith(harm)]), folder)


@pytest.mark.parametrize("harm", ["flip", "cut", "missing"])
def test_a_damaged_part_of_a_divided_checkpoint_is_named_and_the_one_before_used(harm, world, rng, folder):
    harms = [(file, found) for file, found in damages(newest_of(interrupted(world, "fsdp"))) if file.startswith("shard-")]
    damaged_checkpoint(world, "fsdp", *rng.choice([(file, found) for file, found in harms if found.startswith(harm)]), folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("kind", DATA)
def test_damaged_data_is_named_before_the_first_step(kind, verify, world, rng, tmp_path):
    harms = damages(world.folder / DATA[kind].folder)
    for number, name in enumerate(sorted({name for name, _ in harms})):
        harm = rng.choice([harm for file, harm in harms if file == name])
        assert damaged_data(world, kind, name, harm, verify, tmp_path / str(number))["refused"] or not verify


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("times", [1, 3])
def test_what_is_not_finite_on_one_process_of_two_changes_nothing_on_either(times, where, trainer, world, rng, folder):
    """And the third time in a row both go back to the last checkpoint and leave out the stretch from there."""
    assert poisoned(world, rng, folder, trainer, where, times, then_killed=False)["rolled_back"] == (times == 3)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_rollback_leaves_out_stays_out_after_a_kill(trainer, world, rng, folder):
    assert poisoned(world, rng, folder, trainer, times=3, then_killed=True)["then_killed"]


@pytest.mark.usefixtures("needs_a_small_disk")
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_full_disk_is_said_and_the_run_goes_on_once_there_is_room(trainer, filled, world, rng, folder):
    assert disk_full(world, rng, folder, trainer, filled)["failed"]


@pytest.mark.usefixtures("needs_a_small_disk")
def test_a_full_disk_is_said_and_packing_goes_on_once_there_is_room(world, rng, folder):
    assert packing_disk_full(world, rng, folder)["failed"]


@pytest.mark.parametrize("fault", S3_FAULTS)
def test_an_s3_transfer_is_whole_or_said_to_have_failed(fault, world, rng, folder, s3_server, monkeypatch):
    import boto3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    found = s3_fault(world, rng, folder, boto3.client("s3"), fault)
    assert (found["cuts"] > 0) == fault.startswith("cut"), "what was asked for struck"
