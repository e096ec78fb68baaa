import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lm.loss
from lm.loss import packed_loss
from lm.models import build_model
from lm.packing import attention_reach, choose_rows, pack, sees_only_itself

V = 50
ANSWERS = [2, 3, 2, 4, 2, 2]


def make(name):
    torch.manual_seed(0)
    if name == "neox":
        return build_model("neox-64x2", V, 64)
    shape = {"vocab_size": V, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**shape, n_positions=40, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    return LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=64, num_key_value_heads=2))


@pytest.fixture(params=["neox", "llama", "gpt2"])
def model(request):
    """The rotary preset, a model with shared keys and values, and one with a table of learned positions."""
    return make(request.param)


@pytest.fixture
def examples():
    generator = np.random.default_rng(0)
    return [generator.integers(V, size=length) for length in (40, 7, 12, 30, 5, 9)]


def one_by_one(model, examples, loss):
    """The objective written down plainly: each example alone, no padding, no packing."""
    total, weight, correct = 0.0, 0.0, []
    for ids, answer in zip(examples, ANSWERS, strict=True):
        ids = torch.from_numpy(ids)
        logits = model(ids[None, :-1], use_cache=False).logits[0]
        targets = len(ids) - 1
        weights = torch.ones(targets) if loss == "weighted" else torch.zeros(targets)
        weights[-answer:] = 1 + targets / answer if loss == "weighted" else 1
        total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * weights).sum()
        weight += weights.sum().item()
        correct.append(bool((logits.argmax(-1) == ids[1:])[-answer:].all()))
    return total, weight, correct


@pytest.mark.parametrize("loss", ["weighted", "answer_only"])
@pytest.mark.parametrize("reach", [None, 1.0, 100.0, 1e9])
def test_packed_loss_and_gradients_equal_those_of_each_example_alone(model, examples, loss, reach):
    expected, weight, correct = one_by_one(model, examples, loss)
    (expected / weight).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    batch = pack(examples, ANSWERS, loss, reach)
    total, finite, right = packed_loss(model, batch)
    (total / batch["weights"].sum()).backward()
    assert batch["weights"].sum().item() == pytest.approx(weight)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert finite
    assert right.tolist() == correct
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-6, rtol=1e-4)


def test_only_targets_that_are_trained_get_logits(model, examples, monkeypatch):
    sizes, chunks = [], lm.loss._chunks
    monkeypatch.setattr(lm.loss, "_chunks", lambda hidden, *rest: sizes.append(len(hidden)) or chunks(hidden, *rest))
    packed_loss(model, pack(examples, ANSWERS, "answer_only", 100.0))
    packed_loss(model, pack(examples, ANSWERS, "weighted", None))
    assert sizes == [sum(ANSWERS), sum(len(ids) - 1 for ids in examples)]


def test_an_answer_counts_as_right_only_if_all_its_tokens_are(model, examples):
    """Examples that the model itself answered are right; with any one token of the answer changed they are wrong."""
    answered = []
    with torch.no_grad():
        for ids, answer in zip(examples, ANSWERS, strict=True):
            ids = torch.from_numpy(ids)
            for place in range(len(ids) - answer, len(ids)):
                ids[place] = model(ids[None, :place], use_cache=False).logits[0, -1].argmax()
            answered.append(ids.numpy())
        assert packed_loss(model, pack(answered, ANSWERS, "weighted", 100.0))[2].tolist() == [True] * 6
        for number, place in ((0, -1), (3, -4), (5, -2)):
            wrong = [ids.copy() for ids in answered]
            wrong[number][place] = (wrong[number][place] + 1) % V
            right = packed_loss(model, pack(wrong, ANSWERS, "weighted", 100.0))[2].tolist()
            assert right == [other != number for other in range(6)]


def test_an_example_sees_no_other_example(model, examples):
    batch = pack(examples, ANSWERS, "weighted", 1e9)
    assert batch["input_ids"].shape[0] == 1, "all in one row"
    with torch.no_grad():
        before = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for number in range(len(examples)):
            changed = torch.where(batch["example"] == number, (batch["input_ids"] + 1) % V, batch["input_ids"])
            after = model(changed, position_ids=batch["position_ids"], use_cache=False).logits
            others = batch["example"] != number
            assert torch.equal(before[others], after[others])
            assert not torch.equal(before[~others], after[~others])


def test_every_target_is_trained_once(examples):
    batch = pack(examples, ANSWERS, "weighted", 100.0)
    for number, ids in enumerate(examples):
        own = batch["example"] == number
        assert batch["input_ids"][own].tolist() == ids[:-1].tolist()
        assert batch["targets"][own].tolist() == ids[1:].tolist()
        assert batch["position_ids"][own].tolist() == list(range(len(ids) - 1))
        assert batch["weights"][own].sum() == pytest.approx(2 * (len(ids) - 1)), "half of it the answer's"
    padding = batch["example"] == len(examples)
    assert batch["weights"][padding].eq(0).all()
    assert torch.equal(batch["trained"], batch["weights"].flatten().nonzero().flatten())
    assert not batch["answer"][padding].any()
    assert batch["position_ids"].max() < max(map(len, examples)) - 1, "no position that no example has"
    assert batch["lengths"].tolist() == [len(ids) - 1 for ids in examples]


def test_rows_of_one_example_need_no_mask(examples):
    batch = pack(examples, ANSWERS, "weighted", None)
    assert batch["position_ids"].tolist() == [list(range(39))] * 6


def test_short_examples_cost_their_tokens_and_not_their_padding():
    generator = np.random.default_rng(0)
    lengths = [1700, *generator.integers(30, 60, size=63).tolist()]
    rows = choose_rows(lengths, reach=7000.0)
    assert sorted(number for row in rows for number in row) == list(range(64))
    area = len(rows) * max(sum(lengths[number] for number in row) for row in rows)
    assert area < 1.05 * sum(lengths)
    assert 64 * max(lengths) > 20 * area, "what padding would cost"


def test_attention_that_costs_nearly_all_keeps_rows_short_and_attention_that_costs_nothing_makes_one_row():
    assert len(choose_rows([100] * 16, reach=1.0)) == 16
    assert len(choose_rows([100, 60, 40, 7], reach=1e9)) == 1
    assert choose_rows([5], reach=100.0) == [[0]]


def test_attention_reach_is_where_both_costs_are_equal():
    hidden, layers, vocab = 64, 2, 320
    model = build_model("neox-64x2", vocab, 100)
    matrices = layers * 12 * hidden**2 + vocab * hidden  # 4 h^2 of attention and 8 h^2 of MLP a layer, and the head
    assert attention_reach(model) == matrices / (2 * layers * hidden)


def test_a_model_that_mixes_packed_examples_is_noticed(model):
    assert sees_only_itself(model)
    clean = model.forward
    model.forward = lambda input_ids, position_ids=None, **rest: clean(input_ids, **rest)
    assert not sees_only_itself(model)


@pytest.mark.parametrize("training", [True, False])
def test_looking_whether_examples_mix_leaves_the_mode_of_the_model_as_it_was(model, training):
    model.train(training)
    assert sees_only_itself(model)
    assert {module.training for module in model.modules()} == {training}
