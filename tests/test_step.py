import copy
import math
from contextlib import contextmanager

import pytest
import torch
from accelerate import Accelerator

from lm.optim import make_optimizer
from lm.step import plan_batch, train_step


class Line(torch.nn.Module):
    """Three logits that are linear in one number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.3, -0.2, 0.1]]))
        self.bias = torch.nn.Parameter(torch.tensor([0.1, 0.0, -0.1]))

    def forward(self, x):
        return x @ self.weight + self.bias


def loss_sum(model, batch):
    x, target = batch
    logits = model(x)
    return torch.nn.functional.cross_entropy(logits, target, reduction="sum"), logits.detach().isfinite().all()


def batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, generator=generator), torch.randint(3, (count,), generator=generator)


def ready():
    accelerator, model = Accelerator(cpu=True), Line()
    return accelerator, model, accelerator.prepare(make_optimizer("adamw", model, 0.1, (0.9, 0.95), 1e-6, 0.01))


def step(kit, batches, max_grad_norm=math.inf, lr=0.1, weight=None):
    accelerator, model, optimizer = kit
    weight = sum(len(x) for x, _ in batches) if weight is None else weight
    return train_step(accelerator, model, optimizer, batches, loss_sum, weight, lr, max_grad_norm)


def everything(kit):
    _, model, optimizer = kit
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for item in values for tensor in flat(item)]


def test_grad_accum_does_not_change_the_update():
    x, target = batch(12)
    uneven = [(x[:1], target[:1]), (x[1:4], target[1:4]), (x[4:], target[4:])]
    whole, split = ready(), ready()
    for _ in range(3):
        one, many = step(whole, [(x, target)]), step(split, uneven)
        assert many.loss == pytest.approx(one.loss, rel=1e-6)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    for a, b in zip(flat(everything(whole)), flat(everything(split)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)


def test_the_gradient_is_of_the_mean_loss_and_clipped_to_the_norm_that_is_reported():
    kit = ready()
    x, target = batch(12)
    reference = Line()
    loss = torch.nn.functional.cross_entropy(reference(x), target)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
    clipped = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    before = torch.cat([p.detach().flatten() for p in reference.parameters()]).norm()
    optimizer = make_optimizer("adamw", reference, 0.1, (0.9, 0.95), 1e-6, 0.01)
    optimizer.step()
    result = step(kit, [(x[:5], target[:5]), (x[5:], target[5:])], max_grad_norm=0.05)
    assert result.applied
    assert (result.loss, result.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-6)
    assert (result.grad_norm_clipped, result.param_norm) == pytest.approx((clipped.item(), before.item()), rel=1e-5)
    for a, b in zip(kit[1].parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("poison", ["loss", "logit", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment_and_names_the_tensor(poison):
    kit = ready()
    step(kit, [batch(4)])
    before = everything(kit)
    x, target = batch(4, seed=1)
    hook = None
    if poison == "loss":
        x[2] = float("nan")
    elif poison == "gradient":
        hook = kit[1].bias.register_hook(lambda grad: grad * float("inf"))

    def poisoned(model, micro_batch):
        loss, finite = loss_sum(model, micro_batch)
        return loss, finite if poison != "logit" else finite & (micro_batch[0] is not x)

    accelerator, model, optimizer = kit
    result = train_step(accelerator, model, optimizer, [batch(4), (x, target)], poisoned, 8, 0.1, 1.0)
    assert not result.applied
    assert same(everything(kit), before)
    assert (
        result.faults[0]
        == {
            "loss": "loss of micro-batch 1",
            "logit": "logits of micro-batch 1",
            "gradient": "gradient of bias",
        }[poison]
    )
    if hook:
        hook.remove()
    step(kit, [batch(4, seed=2)])
    untouched = ready()
    step(untouched, [batch(4)])
    step(untouched, [batch(4, seed=2)])
    assert same(everything(kit), everything(untouched)), "and the run goes on as if nothing had been"


def with_loss_scale(scale, monkeypatch):
    """What accelerate makes for fp16, which it refuses without a GPU: a real scaler, over float32 arithmetic."""
    accelerator, model = Accelerator(cpu=True), Line()
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = accelerator.prepare(make_optimizer("adamw", model, 0.1, (0.9, 0.95), 1e-6, 0.01))
    optimizer.scaler = accelerator.scaler
    return accelerator, model, optimizer


def test_a_gradient_that_overflows_under_the_loss_scale_is_made_again_with_a_lower_one(monkeypatch):
    plain, scaled = ready(), with_loss_scale(2.0**127, monkeypatch)
    results = [step(kit, [batch(6), batch(6, 1)], weight=0.01) for kit in (scaled, plain)]  # gradients of about 300
    assert results[0].applied
    assert 2.0**100 < scaled[0].scaler.get_scale() < 2.0**127
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)
    for a, b in zip(flat(everything(scaled)), flat(everything(plain)), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


def test_a_nan_under_a_loss_scale_leaves_the_scale_as_it_was(monkeypatch):
    kit = with_loss_scale(2.0**16, monkeypatch)
    step(kit, [batch(4)])
    before, x = everything(kit), batch(4, 1)
    hook = kit[1].bias.register_hook(lambda grad: grad * float("nan"))
    assert not step(kit, [x]).applied
    hook.remove()
    assert not step(kit, [(x[0] * float("nan"), x[1])]).applied
    assert kit[0].scaler.get_scale() == 2.0**16
    assert same(everything(kit), before)


def test_only_the_last_forward_pass_of_a_step_lets_processes_reduce(monkeypatch):
    kit, held, seen = ready(), [], []

    @contextmanager
    def no_sync(model):
        held.append(model)
        yield
        held.pop()

    def noting(model, micro_batch):
        seen.append(bool(held))
        return loss_sum(model, micro_batch)

    monkeypatch.setattr(kit[0], "no_sync", no_sync)
    train_step(*kit, [batch(4), batch(4, 1), batch(4, 2)], noting, 12, 0.1, 1.0)
    assert seen == [True, True, False]


def test_every_parameter_group_gets_the_learning_rate_and_only_matrices_decay():
    kit = ready()
    step(kit, [batch(4)], lr=0.02)
    groups = kit[2].param_groups
    assert [group["lr"] for group in groups] == [0.02, 0.02]
    assert {tuple(p.shape): group["weight_decay"] for group in groups for p in group["params"]} == {(1, 3): 0.01, (3,): 0.0}


def test_plan_batch():
    assert plan_batch(16, None, 512, 8) == (4, 512)
    assert plan_batch(2, 2, None, 8) == (2, 32)
    assert plan_batch(2, 2, 32, 8) == (2, 32)
    with pytest.raises(ValueError, match="--effective_batch 500 is not a multiple of micro_batch x processes = 16 x 8"):
        plan_batch(16, None, 500, 8)
    with pytest.raises(ValueError, match="leave out --grad_accum"):
        plan_batch(16, 3, 512, 8)
    with pytest.raises(ValueError, match="neither"):
        plan_batch(16, None, None, 8)
