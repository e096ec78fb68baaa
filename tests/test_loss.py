import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma2Config, GPTJConfig

import lm.loss
from lm.loss import next_token_loss, token_losses
from lm.models import build_model

V, HIDDEN, T = 300, 16, 24
SMALL = {"neox": "neox-64x2", "llama": "olmo-4m", "gpt2 (tied)": "gpt-baby", "psann": "psann-tiny"}


class Head(torch.nn.Module):
    """A model that is nothing but a table and a head, as transformers' models are asked for them."""

    def __init__(self, bias=True, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Embedding(V, HIDDEN, dtype=dtype)
        self.head = torch.nn.Linear(HIDDEN, V, bias=bias, dtype=dtype)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        class Out:
            logits = self.head(self.table(input_ids))

        return Out


def some(rows=3, targets=T, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (rows, targets + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.rand(rows, targets, generator=generator) * 3


def plainly(model, inputs, targets, weights=None, scale=1.0):
    """Losses and gradients as anyone would write them down, and whether each target is the most likely token."""
    model.zero_grad()
    logits = model(input_ids=inputs, use_cache=False).logits
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    total = nats.sum() if weights is None else (nats * weights).sum()
    (total * scale).backward()
    return total, nats, logits.argmax(-1) == targets, gradients(model)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def in_chunks(model, inputs, targets, weights=None, scale=1.0):
    model.zero_grad()
    found = token_losses(model, targets, weights, True, input_ids=inputs)
    (found.total * scale).backward()
    return found.total, found.nats, found.right, gradients(model)


def relative(found, expected):
    """The largest error of a gradient, in its norm over that of the gradient."""
    assert found.keys() == expected.keys()
    return max(((found[name] - own).norm() / own.norm()).item() for name, own in expected.items())


@pytest.mark.parametrize("chunk", [1, 7 * V, 24 * V, 10**9])
@pytest.mark.parametrize("in_cache", [1, 2 * V, 10**9])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_logits(chunk, in_cache, weighted, bias, monkeypatch):
    monkeypatch.setattr(lm.loss, "CHUNK", chunk)
    monkeypatch.setattr(lm.loss, "IN_CACHE", in_cache)
    model, (inputs, targets, weights) = Head(bias), some()
    weights = weights if weighted else None
    total, nats, right, expected = plainly(model, inputs, targets, weights)
    own_total, own_nats, own_right, found = in_chunks(model, inputs, targets, weights)
    torch.testing.assert_close(own_total, total, rtol=1e-6, atol=0)
    torch.testing.assert_close(own_nats, nats.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(own_right, right)
    assert relative(found, expected) < 1e-6
    assert found.keys() == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-6), ("bf16", 2e-2)])
def test_every_architecture_gets_the_gradients_of_its_whole_logits(name, precision, tolerance, monkeypatch):
    monkeypatch.setattr(lm.loss, "CHUNK", 7 * V)
    torch.manual_seed(0)
    model, (inputs, targets, weights) = build_model(SMALL[name], V, T, dropout=0.0 if "gpt2" in name else None), some()
    monkeypatch.setattr(lm.loss, "_try_the_end", lambda bare, clean=lm.loss._try_the_end: clean(bare) or pytest.fail("plain"))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        total, nats, _, expected = plainly(model, inputs, targets, weights)
        own_total, own_nats, _, found = in_chunks(model, inputs, targets, weights)
    torch.testing.assert_close(own_total, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(own_nats, nats.detach(), rtol=1e-5, atol=1e-5)
    assert relative(found, expected) < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_gradients_err_no_more_than_those_of_the_whole_logits(dtype, monkeypatch):
    monkeypatch.setattr(lm.loss, "CHUNK", 11 * V)
    model, (inputs, targets, weights) = Head(), some()
    exact = plainly(model, inputs, targets, weights, scale=0.25)[3]
    with torch.autocast("cpu", dtype):
        _, _, right, rounded = plainly(model, inputs, targets, weights, scale=0.25)
        _, _, own_right, found = in_chunks(model, inputs, targets, weights, scale=0.25)
    assert torch.equal(own_right, right), "also where two logits are the same number in 16 bits"
    assert relative(found, exact) < 1.2 * relative(rounded, exact)


def test_with_ties_the_first_of_the_most_likely_tokens_counts_as_ever():
    model = Head(bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.head.weight[5] = model.head.weight[9]
        model.table.weight[:] = model.head.weight[9]
    inputs, targets = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[5, 9]])
    assert token_losses(model, targets, None, True, input_ids=inputs).right.tolist() == [[True, False]]


@pytest.mark.parametrize("loss_scale", [2.0**-14, 1.0, 2.0**15])
def test_in_float16_the_loss_scale_does_what_it_does_to_the_whole_logits(loss_scale):
    """It keeps small gradients from vanishing, and where it is too high something overflows, which the scaler must see."""
    model, (inputs, targets, _) = Head(bias=False), some(rows=1, targets=200)
    targets[:] = 3  # so that its row of the gradient is large
    with torch.autocast("cpu", torch.float16):
        expected = plainly(model, inputs, targets, scale=loss_scale)[3]
        found = in_chunks(model, inputs, targets, scale=loss_scale)[3]
    for name, own in expected.items():
        assert found[name].isfinite().all() == own.isfinite().all() == (loss_scale < 2**15), name
        assert ((found[name] != 0).sum() - (own != 0).sum()).abs() <= 0.01 * own.numel()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_logit_that_is_not_finite_is_found_at_any_token_although_the_loss_may_be(bad):
    model, (inputs, targets, _) = Head(), some()
    assert token_losses(model, targets, input_ids=inputs).finite
    absent = next(token for token in range(V) if token not in targets)
    with torch.no_grad():
        model.head.bias[absent] = bad
    found = token_losses(model, targets, input_ids=inputs)
    assert not found.finite
    assert found.total.isfinite() == (bad == -math.inf)


class Sizes(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made in here."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
        return out


def test_the_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(lm.loss, "CHUNK", 10 * V)
    model, (inputs, targets, weights) = Head(), some(rows=30)
    with Sizes() as sizes:
        in_chunks(model, inputs, targets, weights)
    assert sizes.largest == max(10 * V, 30 * T * HIDDEN, V * HIDDEN)
    with Sizes() as sizes:
        plainly(model, inputs, targets, weights)
    assert sizes.largest == 30 * T * V


@pytest.mark.parametrize("kind", ["in chunks", "plainly"])
@pytest.mark.parametrize("weighted", [False, True])
def test_targets_that_are_not_trained_get_no_logits_and_the_others_lose_nothing(kind, weighted, monkeypatch):
    monkeypatch.setattr(lm.loss, "_is_linear_to_the_end", lambda model: kind == "in chunks")
    model, (inputs, targets, weights) = Head(), some(rows=30)
    trained = torch.arange(targets.numel())[5::31]
    kept = torch.zeros(targets.numel()).index_fill_(0, trained, 1.0).view(targets.shape)
    weights = weights if weighted else torch.ones(targets.shape)
    total, nats, right, expected = plainly(model, inputs, targets, weights * kept)
    model.zero_grad()
    with Sizes() as sizes:
        own = token_losses(model, targets, weights if weighted else None, True, trained, input_ids=inputs)
        own.total.backward()
    torch.testing.assert_close(own.total, total)
    torch.testing.assert_close(own.nats, nats.detach() * kept)
    assert torch.equal(own.right, right & (kept > 0))
    assert relative(gradients(model), expected) < 1e-6
    assert sizes.largest == (max(len(trained) * V, targets.numel() * HIDDEN) if kind == "in chunks" else targets.numel() * V)
    assert own.finite
    with torch.no_grad():
        model.table.weight[inputs.flatten()[trained[0]]] = math.nan
    assert not token_losses(model, targets, None, True, trained, input_ids=inputs).finite


def test_without_gradients_the_losses_are_the_same_and_nothing_is_kept():
    model, (inputs, targets, weights) = Head(), some()
    with torch.no_grad():
        found = token_losses(model, targets, weights, input_ids=inputs)
    total, nats, *_ = plainly(model, inputs, targets, weights)
    torch.testing.assert_close(found.total, total.detach())
    torch.testing.assert_close(found.nats, nats.detach())
    assert not found.total.requires_grad
    assert found.right is None


def test_gradients_of_several_losses_add_up():
    model, (inputs, targets, weights) = Head(), some()
    expected = plainly(model, inputs, targets, weights, scale=3.0)[3]
    model.zero_grad()
    losses = [
        token_losses(model, targets[row, None], weights[row, None], input_ids=inputs[row, None]).total for row in range(3)
    ]
    for loss in losses:
        (3.0 * loss).backward()
    assert relative(gradients(model), expected) < 1e-6


@pytest.mark.parametrize("kind", ["capped", "head with a bias"])
def test_a_model_that_changes_its_logits_is_computed_plainly_and_one_with_a_bias_is_not(kind):
    shape = {"vocab_size": V, "num_hidden_layers": 1}
    if kind == "capped":
        config = Gemma2Config(
            hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=16, **shape
        )
        config.final_logit_softcapping = 0.05
    else:
        config = GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64, vocab_size=V)
    torch.manual_seed(0)
    model, (inputs, targets, weights) = AutoModelForCausalLM.from_config(config).eval(), some()
    if kind != "capped":
        torch.nn.init.normal_(model.lm_head.bias)
    assert lm.loss._is_linear_to_the_end(model) is (kind != "capped")
    total, nats, right, expected = plainly(model, inputs, targets, weights)
    own_total, own_nats, own_right, found = in_chunks(model, inputs, targets, weights)
    torch.testing.assert_close(own_total, total)
    torch.testing.assert_close(own_nats, nats.detach())
    assert torch.equal(own_right, right)
    assert relative(found, expected) < 1e-6


def test_the_model_is_afterwards_as_before():
    model = build_model("neox-64x2", V, T)
    inputs, targets, _ = some()
    before = model(input_ids=inputs).logits
    next_token_loss(model, torch.cat([inputs, targets[:, -1:]], dim=1))
    with pytest.raises(IndexError):
        next_token_loss(model, torch.full((1, 3), model.config.vocab_size))
    assert "forward" not in vars(model.get_output_embeddings())
    assert torch.equal(model(input_ids=inputs).logits, before)


def test_the_loss_is_that_of_every_token_but_the_first():
    model, (inputs, targets, _) = Head(), some()
    ids = torch.cat([inputs[:, :1], targets], dim=1)
    total, finite = next_token_loss(model, ids.to(torch.uint16))
    torch.testing.assert_close(total, plainly(model, ids[:, :-1], targets)[0])
    assert finite
