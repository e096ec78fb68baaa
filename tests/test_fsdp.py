"""A model that is divided among processes trains as a whole one, and its checkpoints suit any number of them.

What kills, signals, NaN and full disks do to such runs is in tests/test_faults.py.
"""

import shutil

import pytest
import safetensors
import torch
from launch import Launch
from packs import SETTINGS, write_pack
from safetensors.torch import load_file
from text import byte_level_bpe
from training import events
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm.checkpoint import damage
from lm.files import read_json
from lm.models import load_model
from lm.optim import make_optimizer
from lm.parts import in_parts, shapes_in
from lm.runlog import records
from lm.sharded_checkpoint import load_any

MODEL = "neox-64x2"
OPTIONS = SETTINGS | {
    "mixin_percent": 0.0,
    "total_steps": 10,
    "log_every": 1,
    "eval_every": 5,
    "force_cpu": True,
    "model": MODEL,
}
SHARDED = {"fsdp": "full_shard"}
TOLERANCE = {"adamw8bit": 2e-3, "adafactor": 1e-4, "muon": 2e-3}  # codes of 8 bits, iterations in bfloat16


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    write_pack(folder / "data/c4_packed", byte_level_bpe())
    return folder


@pytest.fixture(scope="module")
def train(scratch):
    """Run pretrain.py in a folder of this name and return the folder."""

    def go(name, processes=1, code=0, **changes):
        folder = scratch / name
        options = OPTIONS | {"scratch_dir": scratch, "output_dir": folder} | changes
        launch = Launch("pretrain.py", options, scratch / f"{name}.out", processes)
        assert launch.wait() == [code] * processes, launch.said()
        return folder

    return go


@pytest.fixture(scope="module")
def undivided(train):
    return train("undivided")


@pytest.fixture(scope="module")
def divided(train):
    return train("divided", 2, **SHARDED)


def stopped_at_5(folder, scratch, name):
    """A copy of a run as it was at step 5."""
    copy = shutil.copytree(folder, scratch / name)
    for path in (copy / "final", copy / "checkpoints/step_00000010"):
        shutil.rmtree(path)
    (copy / "results.json").unlink()
    return copy


def losses(folder):
    return [record["loss"] for record in records(folder, "train")]


def weights(folder):
    return load_file(folder / "final/model.safetensors")


def assert_close(folder, other, tolerance=1e-6):
    assert losses(folder) == pytest.approx(losses(other), abs=tolerance)
    held_out = [[record["c4_loss"] for record in records(run, "eval")] for run in (folder, other)]
    assert held_out[0] == pytest.approx(held_out[1], abs=tolerance)
    mine, others = weights(folder), weights(other)
    assert mine.keys() == others.keys()
    assert max((mine[name] - others[name]).abs().max() for name in mine) < tolerance


def test_two_processes_with_a_part_each_train_as_one_with_all(divided, undivided):
    assert_close(divided, undivided)
    assert records(divided, "train")[3]["grad_norm"] == pytest.approx(records(undivided, "train")[3]["grad_norm"], rel=1e-5)
    derived = [read_json(run / "run.json", "")["derived"] for run in (divided, undivided)]
    assert derived[0].items() >= {name: derived[1][name] for name in ("num_parameters", "non_embedding_parameters")}.items()
    assert (divided / "logs/samples.jsonl").read_text().count("\n") == 3


def test_each_process_writes_its_half_and_the_final_model_is_whole(divided, undivided):
    newest = divided / "checkpoints/step_00000010"
    shards = sorted(newest.glob("shard-*"))
    assert {path.name for path in newest.iterdir()} == {"config.json", "manifest.json", "state.json"} | {p.name for p in shards}
    sizes = [path.stat().st_size for path in shards]
    assert len(sizes) == 2
    assert max(sizes) < 1.05 * min(sizes)
    assert damage(newest) is None
    with safetensors.safe_open(shards[1], "pt") as opened:
        half = opened.get_tensor("gpt_neox.embed_in.weight")
    assert torch.equal(half, weights(divided)["gpt_neox.embed_in.weight"][160:])
    assert sorted(p.name for p in (divided / "final").iterdir()) == sorted(p.name for p in (undivided / "final").iterdir())
    assert read_json(divided / "final/config.json", "") == read_json(undivided / "final/config.json", "")
    model = AutoModelForCausalLM.from_pretrained(divided / "final")
    assert type(model).__name__ == "GPTNeoXForCausalLM"
    assert (len(AutoTokenizer.from_pretrained(divided / "final")), model.config.vocab_size) == (300, 320)


def test_any_of_our_loaders_reads_a_divided_checkpoint(divided):
    model = load_model(divided / "checkpoints/step_00000010")
    assert not model.training
    final = load_model(divided / "final").state_dict()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("processes", "options"), [(1, SHARDED), (3, SHARDED), (1, {}), (2, {})])
def test_a_divided_run_goes_on_at_any_number_of_processes_and_without_fsdp(processes, options, divided, scratch, train):
    name = f"from_divided_{processes}{'_divided' if options else ''}"
    stopped_at_5(divided, scratch, name)
    folder = train(name, processes, micro_batch=1, **options)
    assert events(folder)[-2]["event"] == "resumed"
    assert_close(folder, divided)
    assert in_parts(folder / "checkpoints/step_00000010") == bool(options)


def test_an_undivided_run_goes_on_divided(undivided, scratch, train):
    stopped_at_5(undivided, scratch, "from_undivided")
    assert_close(train("from_undivided", 2, **SHARDED), undivided)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor", "muon"])
def test_optimizers_update_parts_as_they_update_the_whole(optimizer, train, scratch):
    """neox-64x2 has matrices of 64 and of 256 columns: of the latter adamw8bit keeps 8 bits, of the others 32."""
    options = {"optimizer": optimizer, "lr": 1e-3}
    one = train(f"{optimizer}_1", 1, **SHARDED, **options)
    two = train(f"{optimizer}_2", 2, **SHARDED, **options)
    assert_close(two, one, TOLERANCE[optimizer])
    if optimizer != "adamw8bit":  # which keeps 8 bits of other matrices where they are not divided
        assert_close(two, train(f"{optimizer}_whole", 1, **options), TOLERANCE[optimizer])
    stopped_at_5(two, scratch, f"{optimizer}_resumed")
    resumed = train(f"{optimizer}_resumed", 2, **SHARDED, **options)
    assert losses(resumed) == losses(two)
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(resumed).items())
    kept = shapes_in(two / "checkpoints/step_00000010")
    matrix = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"  # 64 rows of 256
    moments = {name.rpartition("/")[2]: about for name, about in kept.items() if name.startswith(matrix + "/")}
    count, whole = ((), torch.float32), ((64, 256), torch.float32)
    codes, scales = ((64, 256), torch.uint8), ((64, 1), torch.float32)
    assert (
        moments
        == {
            "adamw8bit": {"step": count, "state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales},
            "adafactor": {"step": count, "row_var": ((64, 1), torch.float32), "col_var": ((1, 256), torch.float32)},
            "muon": {"momentum_buffer": whole},
        }[optimizer]
    )


@pytest.mark.parametrize("option", ["grad_checkpoint", "cpu_offload"])
def test_what_saves_memory_changes_no_number(option, divided, train):
    folder = train(option, 2, **SHARDED, **{option: True})
    assert_close(folder, divided)


def test_bf16_travels_in_bf16_and_learns(train, divided, scratch):
    folder = train("bf16", 2, **SHARDED, precision="bf16")
    assert losses(folder) == pytest.approx(losses(divided), abs=0.05)
    assert losses(folder) != losses(divided)
    assert losses(folder)[-1] < losses(folder)[0] - 0.5
    assert {dtype for _, dtype in shapes_in(folder / "checkpoints/step_00000010").values()} == {torch.float32}


def test_held_out_examples_that_do_not_divide_are_each_counted_once(train, divided, undivided):
    """5 blocks on two processes, of which the second makes a pass for company alone."""
    assert records(divided, "eval")[0]["c4_loss"] == pytest.approx(records(undivided, "eval")[0]["c4_loss"], abs=1e-6)


def test_what_cannot_be_is_said_before_anything_is_loaded(train, scratch):
    train("refused", code=1, cpu_offload=True)
    assert "--cpu_offload without --fsdp: pass --fsdp full_shard too" in (scratch / "refused.out").read_text()
    train("refused_too", code=1, precision="fp16", **SHARDED)
    assert "--fsdp with --precision fp16" in (scratch / "refused_too.out").read_text()
    assert not (scratch / "refused").exists()


def test_a_checkpoint_of_another_model_or_optimizer_is_refused_by_name(divided, tmp_path):
    path = divided / "checkpoints/step_00000010"
    model = load_model(path)
    with pytest.raises(ValueError, match=r"embed_in.weight/exp_avg is of something else"):
        load_any(path, model, make_optimizer("sgd", model, 0.1, (0.9, 0.9), 1e-8, 0.0))
    model.config.vocab_size = 200
    smaller = type(model)(model.config)
    with pytest.raises(ValueError, match=r"\(320, 64\) of torch.float32, \(200, 64\) of torch.float32 is needed"):
        load_any(path, smaller, make_optimizer("adamw", smaller, 0.1, (0.9, 0.9), 1e-8, 0.0))
    part = shutil.copytree(path, tmp_path / "part")
    next(part.glob("shard-00001*")).unlink()
    with pytest.raises(ValueError, match="has not all parts of|is not there"):
        load_any(part, model, make_optimizer("adamw", model, 0.1, (0.9, 0.9), 1e-8, 0.0))
