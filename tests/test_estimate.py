"""The estimate of memory and time, against what training really takes."""

import dataclasses
import functools
import itertools

import pytest
import torch
from accelerate import Accelerator
from packs import pretrain_here, write_pack
from text import byte_level_bpe
from torch.profiler import ProfilerActivity, profile
from transformers import Gemma2Config

import lm.loss
import pretrain
from lm.activations import Live, make_model, make_pass
from lm.estimate import Setup, estimate, free_in_cgroup, operations
from lm.loss import next_token_loss
from lm.models import build_model, on_paper
from lm.optim import make_optimizer
from lm.precision import DTYPES
from lm.step import train_step

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


CAPPED = Gemma2Config(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
)


def model_of(name, setup, vocab_size=300):
    """Real, in the arithmetic of the setup, as accelerate makes it."""
    config = CAPPED if name == "capped" else on_paper(name, vocab_size, setup.seq_len).config
    return make_model(config, setup.device, torch.float32, DTYPES[setup.precision], setup.grad_checkpoint)


def most_allocated(compute):
    """Bytes by which torch's allocator gave out more at one time than at the beginning, from its own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        compute()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def step_of(model, micro_batches, seq_len):
    """One update of this model as every trainer makes it, for the second time: all moments are there."""
    accelerator, optimizer = Accelerator(cpu=True), make_optimizer("adamw", model, 1e-3, (0.9, 0.9), 1e-8, 0.0)
    rows = [torch.randint(model.config.vocab_size, (SETUP.micro_batch, seq_len + 1)) for _ in range(micro_batches)]
    step = functools.partial(train_step, accelerator, model, optimizer, rows, next_token_loss, 1.0, 1e-3, 1.0)
    assert step().applied
    return step


@pytest.mark.parametrize(("precision", "micro_batches"), [("fp32", 1), ("bf16", 3)])
@pytest.mark.parametrize("name", ["neox-128x2", "olmo-8m", "gpt-baby", "psann-tiny", "capped"])
def test_a_step_takes_as_much_memory_as_estimated(name, precision, micro_batches, monkeypatch):
    monkeypatch.setattr(lm.loss, "CHUNK", 40 * 300)  # so that chunks are smaller than the logits
    monkeypatch.setattr(lm.loss, "IN_CACHE", 8 * 300)
    setup = dataclasses.replace(SETUP, precision=precision, accumulates=micro_batches > 1)
    model = model_of(name, setup)
    parts = estimate(model.config, setup).device
    taken = most_allocated(step_of(model, micro_batches, setup.seq_len))
    assert parts["gradients"] + parts["activations"] == pytest.approx(taken, rel=0.03)  # kernels need a little themselves


def test_with_a_large_vocabulary_the_logits_are_never_whole_and_those_of_a_model_that_changes_them_are():
    setup = dataclasses.replace(SETUP, micro_batch=8, seq_len=512)
    logits = 8 * 512 * 50_304 * 4
    chunked = activations_of(on_paper("neox-64x2", 50_304, 512).config, setup)
    whole = activations_of(type(CAPPED).from_dict(CAPPED.to_dict() | {"vocab_size": 50_304}), setup)
    assert chunked < 0.4 * logits < 2 * logits < whole


def activations_of(config, setup):
    return estimate(config, setup).device["activations"]


def test_with_checkpointing_a_pass_takes_as_much_memory_as_estimated():
    setup = dataclasses.replace(SETUP, grad_checkpoint=True)
    model = model_of("olmo-8m", setup)
    found = activations_of(model.config, setup)
    rows = torch.randint(300, (4, 65))
    make_pass(model, rows, packed=False)
    assert found == pytest.approx(most_allocated(lambda: make_pass(model, rows, packed=False)), rel=0.01)
    assert found < activations_of(model.config, SETUP) / 2


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_several_documents_need_a_mask_in_each_layer_and_others_none(packed):
    setup = dataclasses.replace(SETUP, packed=packed, seq_len=200)
    model = model_of("neox-128x2", setup)
    rows = torch.randint(300, (4, 201))
    make_pass(model, rows, packed)
    taken = most_allocated(lambda: make_pass(model, rows, packed))
    assert activations_of(model.config, setup) == pytest.approx(taken, rel=0.01)
    without = activations_of(model.config, dataclasses.replace(setup, packed=False))
    assert activations_of(model.config, setup) - without >= 2 * 4 * 200 * 200 * 4 * packed


def test_dropout_counts():
    one, none = (on_paper("gpt-baby", 300, 64, dropout).config for dropout in (None, 0.0))
    assert activations_of(one, SETUP) > 1.1 * activations_of(none, SETUP)


def test_a_model_whose_code_needs_numbers_is_estimated_without_its_activations(monkeypatch, capsys):
    monkeypatch.setattr("lm.activations.token_losses", lambda *_, **__: torch.zeros(()).item())
    found = estimate(on_paper("neox-64x2", 300, 64).config, SETUP)
    assert found.device["activations"] == 0
    assert "activations are not estimated" in capsys.readouterr().out


def test_views_count_once_and_what_is_dropped_no_longer():
    own = torch.zeros(1000)
    with Live([own]) as live:
        first = own + 1
        second = first.view(10, 100)
        assert (live.now, live.peak) == (4000, 4000)
        own.mul_(2)
        own.view(10, 100)
        del first
        assert live.now == 4000
        del second
        assert (live.now, live.peak) == (0, 4000)
        kept = own.double(), torch.ones(10)
        assert (live.now, live.peak) == (8040, 8040)
        del kept


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
