"""The four faults that stopped an earlier attempt at OLMo's ladder, each as a law that every architecture here keeps."""

import math
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lm.models import build_model, load_model
from lm.presets import PRESETS

FAMILIES = ["neox-64x2", "pythia-14m", "olmo-4m", "olmo-14m", "gpt-baby", "gpt3-125m"]
ROTARY = ["neox-64x2", "pythia-14m", "olmo-4m", "olmo-14m"]
V = 300


def small(name: str, monkeypatch, positions: int = 64):
    """A model of this preset's class and heads with two layers, no wider than 16 dimensions a head."""
    preset = PRESETS[name]
    hidden = min(preset.hidden, 16 * preset.heads)
    monkeypatch.setitem(PRESETS, "small", replace(preset, hidden=hidden, layers=2))
    torch.manual_seed(0)
    return build_model("small", V, positions, dropout=0.0)


# A buffer registered twice


@pytest.mark.parametrize("name", FAMILIES)
def test_building_saving_and_loading_twice_gives_the_same_names_and_numbers_once(name, tmp_path, monkeypatch):
    first, second = small(name, monkeypatch), small(name, monkeypatch)
    buffers = Counter(buffer for buffer, _ in first.named_buffers(remove_duplicate=False))
    assert set(buffers.values()) <= {1}
    assert set(first.state_dict()) == {weight for weight, _ in first.named_parameters(remove_duplicate=False)}, (
        "no buffer is saved"
    )
    assert [name for name, _ in second.named_buffers()] == [name for name, _ in first.named_buffers()]
    for path in (tmp_path / "once", tmp_path / "twice"):
        first.save_pretrained(path)
        first = load_model(path)
    with safe_open(tmp_path / "twice/model.safetensors", "pt") as saved:
        assert not [key for key in saved.keys() if "rotary" in key or "inv_freq" in key or "mask" in key]  # noqa: SIM118
    assert set(first.state_dict()) == set(second.state_dict())
    for key, weight in second.state_dict().items():
        assert torch.equal(weight, first.state_dict()[key]), key
    for key, buffer in second.named_buffers():
        assert torch.equal(buffer, first.get_buffer(key)), key
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(first.eval()(ids).logits, second.eval()(ids).logits)


# Vocabulary mismatch


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("ids", [50_277, 50_280, 50_304, 50_305, 75])
def test_embedding_and_head_have_a_row_for_every_id_of_the_tokenizer(name, ids):
    with torch.device("meta"):
        model = build_model(name, ids, 16)
    sizes = len(model.get_input_embeddings().weight), len(model.get_output_embeddings().weight), model.config.vocab_size
    multiple = 128 if name.startswith("olmo") else 64
    assert sizes == (math.ceil(ids / multiple) * multiple,) * 3


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_id_trains_and_the_next_is_refused(name, monkeypatch):
    model = small(name, monkeypatch)
    last = model.config.vocab_size - 1
    ids = torch.tensor([[0, last, 1, last]])
    model(ids, labels=ids).loss.backward()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.grad[last].abs().sum() > 0
    with pytest.raises(IndexError):
        model(torch.tensor([[0, last + 1]]))
    with pytest.raises(IndexError):
        model(torch.tensor([[0, 1]]), labels=torch.tensor([[0, last + 1]]))


# Rotary indexing


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pieces", [(1,) * 24, (5, 1, 18), (23, 1)])
def test_a_sequence_in_pieces_with_a_cache_has_the_logits_of_the_whole(name, pieces, monkeypatch):
    model, ids = small(name, monkeypatch).eval(), torch.randint(V, (2, 24), generator=torch.Generator().manual_seed(1))
    cache, logits = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in ids.split(pieces, dim=1):
            logits.append(model(piece, past_key_values=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_position_has_the_same_logits_in_a_sequence_of_any_length(name, monkeypatch):
    model, ids = small(name, monkeypatch).eval(), torch.randint(V, (1, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        for length in (1, 2, 7, 63):
            torch.testing.assert_close(model(ids[:, :length]).logits, whole[:, :length], atol=1e-5, rtol=1e-4)
        positions = torch.arange(64)[None]
        torch.testing.assert_close(model(ids, position_ids=positions).logits, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_logits_depend_on_the_distances_between_positions_alone(name, monkeypatch):
    model = small(name, monkeypatch, 4096).eval()
    ids = torch.randint(V, (1, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for matrix in model.parameters():
            matrix.mul_(5 if matrix.ndim > 1 else 1)  # so that attention looks somewhere, which it hardly does at first
        plain = model(ids).logits
        for shift in (1, 100, 4000):
            shifted = model(ids, position_ids=torch.arange(shift, shift + 32)[None]).logits
            torch.testing.assert_close(shifted, plain, atol=1e-2, rtol=1e-3)
        spread = model(ids, position_ids=torch.arange(0, 64, 2)[None]).logits
    assert (spread - plain).abs().max() > 0.1


def test_position_p_turns_each_pair_of_dimensions_by_p_times_its_frequency():
    model = build_model("olmo-4m", V, 16)  # heads of 8 dimensions: pairs (i, i + 4) turn by p / 10,000^(i / 4)
    query = torch.randn(1, 1, 16, 8, generator=torch.Generator().manual_seed(1))
    cosine, sine = model.model.rotary_emb(query, torch.arange(16)[None])
    turned, _ = apply_rotary_pos_emb(query, query, cosine, sine)
    for p in range(16):
        pairs = torch.complex(query[0, 0, p, :4], query[0, 0, p, 4:])
        angles = torch.tensor([p / 10_000 ** (i / 4) for i in range(4)])
        expected = pairs * torch.polar(torch.ones(4), angles)
        torch.testing.assert_close(turned[0, 0, p], torch.cat([expected.real, expected.imag]), atol=1e-6, rtol=1e-5)


# Mask shape


@pytest.mark.parametrize("name", ["neox-64x2", "olmo-4m", "gpt-baby"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 2), (2, 17), (5, 8), (1, 2048)])
def test_batches_of_any_shape_train_without_a_leak(name, precision, padded, B, T, monkeypatch):
    model = small(name, monkeypatch, max(T, 64))
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    mask_BT, labels = None, ids
    if padded:
        mask_BT = torch.ones(B, T, dtype=torch.long)
        mask_BT[0, T - T // 3 :] = 0  # on the right, as in training
        labels = ids.masked_fill(mask_BT == 0, -100)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), warnings.catch_warnings(action="error"):
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, attention_mask=mask_BT).logits
        assert logits.shape == (B, T, model.config.vocab_size)
        # the gradient of one logit says exactly which tokens it has looked at
        seen = torch.autograd.grad(logits[:, T // 2].float().sum(), embedded, retain_graph=True)[0].abs().sum(-1)
        assert seen[:, T // 2 + 1 :].eq(0).all()
        assert seen[:, T // 2].gt(0).all()
        if T > 1:
            loss = model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)
            loss.backward()
            assert loss.isfinite()
            assert all(weight.grad is None or weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mask_of_ones_and_padding_on_the_right_change_no_logit_before_it(name, monkeypatch):
    model, ids = small(name, monkeypatch).eval(), torch.randint(V, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids).logits
        ones = torch.ones(3, 20, dtype=torch.long)
        torch.testing.assert_close(model(ids, attention_mask=ones).logits, plain, atol=1e-5, rtol=1e-4)
        ones[1, 12:] = 0
        padded = model(ids, attention_mask=ones).logits
        torch.testing.assert_close(padded[1, :12], plain[1, :12], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(padded[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=1e-4)
