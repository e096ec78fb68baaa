import copy
import dataclasses
import re
import sys
from typing import get_args

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

import pretrain
from lm.checkpoint import Checkpoints, load_checkpoint
from lm.models import build_model
from lm.optim import OptimizerName, make_optimizer, parameter_groups, set_beta1
from lm.trainer_args import fall_back

NAMES = get_args(OptimizerName)
LR = {"adamw": 3e-3, "adamw8bit": 3e-3, "adafactor": 1e-1, "muon": 3e-3, "sgd": 1e-1}
BIAS = "gpt_neox.final_layer_norm.bias"  # 64 numbers: too few for 8 bits
WEIGHT = "gpt_neox.layers.0.attention.dense.weight"  # 64 x 64, just enough
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq", "step"),
    "adamw8bit": ("absmax1", "absmax2", "qmap1", "qmap2", "state1", "state2", "step"),
    "adafactor": ("col_var", "row_var", "step"),
    "muon": ("momentum_buffer",),
    "sgd": ("momentum_buffer",),
}


def small(seed=0):
    torch.manual_seed(seed)
    return build_model("neox-64x2", 50, 16)


def tied():
    """A tied model with a table of positions, and matrices that are transposed."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=64, n_layer=1, n_head=4))
    assert model.lm_head.weight is model.transformer.wte.weight
    return model


def made(name, model, lr=None, weight_decay=0.1):
    """The optimizer as a trainer has it: prepared by accelerate, which loads its own empty state into it."""
    optimizer = make_optimizer(name, model, LR[name] if lr is None else lr, (0.9, 0.95), 1e-6, weight_decay)
    return Accelerator(cpu=True).prepare(optimizer)


def update(model, optimizer, seed=0):
    """One update on a row of tokens, and its loss before."""
    tokens = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(seed))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def saved(folder, model, optimizer):
    checkpoints = Checkpoints(folder, 3)
    checkpoints.save(3, model, optimizer, {})
    checkpoints.wait()
    checkpoints.close()
    return checkpoints.paths()[0]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_learns_a_row_of_tokens_by_heart(name):
    model = small()
    optimizer = made(name, model)
    losses = [update(model, optimizer) for _ in range(40)]
    assert losses[0] > 3.5
    assert losses[-1] < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_what_went_through_a_checkpoint_trains_on_bit_for_bit(name, tmp_path):
    model = small()
    optimizer = made(name, model)
    for seed in range(3):
        update(model, optimizer, seed)
    path = saved(tmp_path, model, optimizer)
    again = small(seed=9)
    reloaded = made(name, again)
    update(again, reloaded, seed=7)  # a moment of before must not stay
    load_checkpoint(path, again, reloaded)
    for seed in (3, 4):
        assert update(again, reloaded, seed) == update(model, optimizer, seed)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        state, needed = reloaded.state[mine], optimizer.state[theirs]
        assert state.keys() == needed.keys()
        assert all(type(state[key]) is type(needed[key]) for key in needed)
        assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(needed[key])) for key in needed)


@pytest.mark.parametrize("name", NAMES)
def test_moments_that_do_not_fit_the_optimizer_are_named_and_nothing_changes(name, tmp_path):
    model = small()
    optimizer = made(name, model)
    update(model, optimizer)
    path = saved(tmp_path, model, optimizer)
    update(model, optimizer)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    file = path / "optimizer.safetensors"
    with safetensors.safe_open(file, "pt") as opened:
        about, tensors = opened.metadata(), safetensors.torch.load_file(file)
    for moment in MOMENTS[name]:
        key = f"{WEIGHT}/{moment}"
        good = tensors[key]
        halved = good.half() if good.is_floating_point() else good.to(torch.int16)
        longer = torch.zeros((*good.shape, 1), dtype=good.dtype)
        needed = f"{tuple(good.shape)} and {good.dtype} are needed"
        for value, fault in (
            (None, f"{', '.join(MOMENTS[name])} are needed"),
            (halved, f"{key} has shape {tuple(good.shape)} and {halved.dtype}, {needed}"),
            (longer, f"{key} has shape {tuple(longer.shape)} and {good.dtype}, {needed}"),
        ):
            changed = {other: tensor for other, tensor in (tensors | {key: value}).items() if tensor is not None}
            if name in ("muon", "sgd") and value is None:
                fault = f"those of {WEIGHT}"  # its only one
            safetensors.torch.save_file(changed, file, about)
            with pytest.raises(ValueError, match=re.escape(fault)) as raised:
                load_checkpoint(path, model, optimizer)
            assert str(raised.value).startswith(f"{file} does not fit the model (")
    assert all(torch.equal(parameter, before[key]) for key, parameter in model.named_parameters())
    found = optimizer.state_dict()["state"]
    assert str(found) == str(state)


@pytest.mark.parametrize("name", NAMES)
def test_the_moments_of_another_optimizer_are_refused(name, tmp_path):
    model = small()
    optimizer = made(name, model)
    update(model, optimizer)
    path = saved(tmp_path, model, optimizer)
    for other in set(NAMES) - {name}:
        with pytest.raises(ValueError, match=r"has the moments .* are needed.*: pass another checkpoint"):
            load_checkpoint(path, model, made(other, model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [small, tied])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(name, build):
    """With a gradient of zero, all that moves a weight is its decay."""
    model = build()
    optimizer = made(name, model, lr=0.1, weight_decay=0.5)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_()
        parameter.grad = torch.zeros_like(parameter)
    before = weights(model)
    optimizer.step()
    for key, parameter in model.named_parameters():
        needed = before[key] * (0.95 if parameter.ndim >= 2 else 1.0)
        assert torch.allclose(parameter, needed, rtol=1e-6, atol=0), key


def test_norms_and_biases_decay_too_if_all_does():
    model = small()
    for name in NAMES:
        groups = parameter_groups(name, model, 0.5, "all")
        assert {group["weight_decay"] for group in groups} == {0.5}
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_of_zero_changes_nothing_and_any_other_every_parameter(name):
    model = small()
    optimizer = made(name, model, lr=1.0)
    before = weights(model)
    for lr in (0.0, LR[name]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        update(model, optimizer, seed=3)
        moved = [key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])]
        assert moved == ([] if lr == 0 else list(before))


@pytest.mark.parametrize(
    ("build", "outside"),
    [(small, {"gpt_neox.embed_in.weight", "lm_head.weight"}), (tied, {"transformer.wte.weight", "transformer.wpe.weight"})],
)
def test_muon_takes_the_matrices_between_the_embeddings_and_the_head(build, outside):
    model = build()
    update(model, optimizer := made("muon", model))
    muon = {key for key, parameter in model.named_parameters() if set(optimizer.state[parameter]) == {"momentum_buffer"}}
    assert muon == {key for key, parameter in model.named_parameters() if parameter.ndim == 2} - outside
    assert all("exp_avg" in optimizer.state[p] for key, p in model.named_parameters() if key not in muon)


def test_muon_with_adamw_is_torchs_two_optimizers_side_by_side():
    one, two = small(), small()
    optimizer = made("muon", one)
    groups = parameter_groups("muon", two, 0.1, "matrices")
    muon = torch.optim.Muon([g for g in groups if g["rule"] == "muon"], lr=3e-3, adjust_lr_fn="match_rms_adamw")
    others = [g for g in groups if g["rule"] == "adamw"]
    adamw = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), eps=1e-6, fused=True)
    for seed in range(3):
        tokens = torch.randint(50, (1, 16), generator=torch.Generator().manual_seed(seed))
        two(tokens, labels=tokens).loss.backward()
        muon.step()
        adamw.step()
        two.zero_grad()
        update(one, optimizer, seed)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_scale_changes_no_update_and_an_overflow_makes_none(name):
    plain, scaled = small(), small()
    optimizers = made(name, plain), made(name, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tokens = torch.arange(16)[None]
    for _ in range(2):
        plain(tokens, labels=tokens).loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        scaler.scale(scaled(tokens, labels=tokens).loss).backward()
        scaler.step(optimizers[1].optimizer)
        scaler.update()
        optimizers[1].zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    scaler.scale(scaled(tokens, labels=tokens).loss * torch.inf).backward()
    scaler.step(optimizers[1].optimizer)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_settings_reach_the_groups_and_the_first_beta_of_all_can_be_set(name):
    """Muon's own momentum is .95; Adafactor has no first moment."""
    optimizer = made(name, small())
    groups = optimizer.param_groups
    assert {group["lr"] for group in groups} == {LR[name]}
    assert {group["eps"] for group in groups if group["rule"].startswith("adamw")} <= {1e-6}

    def betas():
        return {group["rule"]: group.get("betas", group.get("momentum")) for group in groups}

    adam = {rule: (0.9, 0.95) for rule in ("adamw", "adamw8bit")}
    rules = ("adamw", "muon") if name == "muon" else (name,)
    assert betas() == {rule: (adam | {"muon": 0.95, "sgd": 0.9}).get(rule) for rule in rules}
    set_beta1(optimizer, 0.85)
    assert betas() == {rule: ({"adafactor": None} | dict.fromkeys(adam, (0.85, 0.95))).get(rule, 0.85) for rule in rules}


def test_without_bitsandbytes_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match=r"no bitsandbytes \(.*\), --optimizer adamw8bit needs it: pip install bitsandbytes"):
        made("adamw8bit", small())


def test_without_bitsandbytes_a_trainer_falls_back_to_adamw_and_says_so(monkeypatch, capsys):
    args = pretrain.Args(scratch_dir="S", optimizer="adamw8bit")
    assert fall_back(args) is args
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert fall_back(args) == dataclasses.replace(args, optimizer="adamw")
    assert "no bitsandbytes, --optimizer adamw8bit needs it: falling back to adamw" in capsys.readouterr().out
    muon = dataclasses.replace(args, optimizer="muon")
    assert fall_back(muon) is muon
