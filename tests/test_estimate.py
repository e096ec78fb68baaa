"""The estimate of memory and time, against what training really takes."""

import dataclasses

import pytest
import torch
from packs import pretrain_here, write_pack
from text import byte_level_bpe
from transformers import AutoModelForCausalLM

import pretrain
from lm.estimate import Setup, activations, estimate, free_in_cgroup, operations
from lm.measure import DTYPES
from lm.models import build_model, on_paper
from lm.optim import make_optimizer

SETUP = Setup(
    optimizer="adamw",
    precision="fp32",
    fsdp=False,
    cpu_offload=False,
    grad_checkpoint=False,
    micro_batch=4,
    seq_len=64,
    tokens=10**6,
    num_processes=1,
    local_processes=1,
    device=torch.device("cpu"),
)


def kept_in_truth(model, setup):
    """Bytes that autograd keeps of one forward pass, seen by a hook; parameters are not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(300, (setup.micro_batch, setup.seq_len))
    dtype = DTYPES[setup.precision]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten(), reduction="none")
    found = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)
    del loss
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["neox-128x2", "olmo-8m", "gpt-baby", "psann-tiny"])
def test_activations_are_those_that_autograd_keeps(name, precision):
    model = build_model(name, 300, 64, dropout=0.0 if name == "gpt-baby" else None)
    setup = dataclasses.replace(SETUP, precision=precision)
    of_the_gradient = 2 * setup.micro_batch * setup.seq_len * 300 * 4
    assert activations(model.config, setup) - of_the_gradient == pytest.approx(kept_in_truth(model, setup), rel=0.03)


def test_with_checkpointing_each_block_keeps_its_input_and_one_is_whole():
    config = on_paper("olmo-8m", 300, 64).config
    one, two = (kept_in_truth(AutoModelForCausalLM.from_config(at(config, layers)), SETUP) for layers in (1, 2))
    block, one_input, of_the_gradient = two - one, 4 * 64 * 128 * 4, 2 * 4 * 64 * config.vocab_size * 4
    expected = (one - block) + of_the_gradient + 8 * one_input + block
    found = activations(config, dataclasses.replace(SETUP, grad_checkpoint=True))
    assert found == pytest.approx(expected, rel=0.03)
    assert found < activations(config, SETUP) / 4


def at(config, layers):
    return type(config).from_dict(config.to_dict() | {"num_hidden_layers": layers})


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "muon", "sgd"])
def test_parameters_gradients_and_moments_are_counted_exactly(optimizer):
    model = build_model("neox-128x2", 300, 64)
    optimizer_of = make_optimizer(optimizer, model, 1e-3, (0.9, 0.9), 1e-8, 0.0)
    model(input_ids=torch.arange(64)[None], labels=torch.arange(64)[None]).loss.backward()
    optimizer_of.step()
    tensors = [torch.as_tensor(value) for state in optimizer_of.state.values() for value in state.values()]
    parts = estimate(model.config, dataclasses.replace(SETUP, optimizer=optimizer)).device
    assert parts["moments"] == sum(tensor.nbytes for tensor in tensors)
    assert parts["weights"] == parts["gradients"] == sum(parameter.nbytes for parameter in model.parameters())


def test_fsdp_divides_what_is_kept_and_not_what_computes():
    config = on_paper("olmo-8m", 300, 64).config
    one = estimate(config, SETUP).device
    eight = estimate(config, dataclasses.replace(SETUP, fsdp=True, num_processes=8)).device
    assert [eight[name] * 8 for name in ("weights", "gradients", "moments")] == [
        one[name] for name in ("weights", "gradients", "moments")
    ]
    assert eight["activations"] == one["activations"]
    assert 0 < eight["gathered"] < one["weights"] + one["gradients"]


def test_operations_are_six_for_each_weight_and_those_of_attention():
    model = on_paper("olmo-8m", 300, 64)
    matrices = 8 * (4 * 128**2 + 3 * 128 * 512) + 384 * 128
    assert operations(model, 64) == 6 * matrices + 6 * 8 * 128 * 64


def test_more_than_there_is_is_refused_with_what_would_help(monkeypatch):
    monkeypatch.setattr("lm.estimate._free_memory", lambda: 2.0 * 2**30)
    config = on_paper("pythia-160m", 300, 64).config
    (fault,) = estimate(config, SETUP).faults()
    assert fault.startswith("a process needs about 2.")
    assert "more processes with --fsdp full_shard" in fault
    assert "2 GiB are there for it" in fault
    assert not estimate(config, dataclasses.replace(SETUP, fsdp=True, num_processes=8)).faults()
    many = dataclasses.replace(SETUP, micro_batch=64, seq_len=1024)
    assert "--grad_checkpoint" in estimate(on_paper("olmo-8m", 300, 64).config, many).faults()[0]


def test_a_run_that_cannot_fit_ends_before_its_model_is_built(tmp_path, monkeypatch, capsys):
    write_pack(tmp_path / "data/c4_packed", byte_level_bpe())
    options = {"mixin_percent": 0.0, "total_steps": 2, "model": "neox-64x2"}
    monkeypatch.setattr(pretrain, "WORTH_AN_ESTIMATE", 0)
    assert pretrain_here(tmp_path / "fits", tmp_path, **options) == 0
    assert "estimate for each process: " in capsys.readouterr().out
    monkeypatch.setattr("lm.estimate._free_memory", lambda: 2.0**28)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "make_model", lambda *_: pytest.fail("it was built"))
        with pytest.raises(ValueError, match="or begin anyway with --ignore_estimate"):
            pretrain_here(tmp_path / "refused", tmp_path, **options)
    assert not (tmp_path / "refused").exists()
    assert pretrain_here(tmp_path / "tried", tmp_path, **options, ignore_estimate=True) == 0


def test_a_schedulers_limit_counts_at_every_level_and_file_pages_are_free(tmp_path):
    def limit(name, maximum, current, droppable):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "memory.max").write_text(f"{maximum}\n")
        (tmp_path / name / "memory.current").write_text(f"{current}\n")
        (tmp_path / name / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")

    limit("job_1/step_0", "max", 900, 0)
    assert free_in_cgroup(tmp_path, "job_1/step_0") == float("inf")
    limit("job_1", 1000, 900, 300)
    assert free_in_cgroup(tmp_path, "job_1/step_0") == 400
    limit("job_1/step_0", 950, 900, 100)
    assert free_in_cgroup(tmp_path, "job_1/step_0") == 150
