"""Losses agree with a slow computation token by token, and standard errors with the spread of repeated experiments."""

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lm.measure import (
    binned,
    consecutive_windows,
    context_bins,
    document_losses,
    mean_and_se,
    ratio_and_se,
    window_losses,
)

T, V = 12, 61


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=V,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout=0.5,  # so that losses differ if evaluation forgets to turn it off
        initializer_range=0.3,  # far from uniform predictions
    )
    return GPTNeoXForCausalLM(config)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, V, (7, T + 1)).astype(np.uint16)


def slow_losses(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """-ln p of each token but the first, each from a forward pass of its own over just the tokens before it."""
    was_training, losses = model.training, []
    model.eval()
    for t in range(1, len(tokens)):
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, :t].astype(np.int64))).logits[0, -1].double().numpy()
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[t]])
    model.train(was_training)
    return np.array(losses)


def test_window_losses_equal_one_forward_pass_per_token(model, windows):
    expected = np.stack([slow_losses(model, window) for window in windows])
    losses = window_losses(model, windows, micro_batch=3)
    assert losses.dtype == np.float64
    np.testing.assert_allclose(losses, expected, atol=2e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_even_after_an_error(model, windows, training):
    model.train(training)
    window_losses(model, windows, micro_batch=4)
    assert model.training is training
    with pytest.raises(IndexError):
        window_losses(model, windows + V, micro_batch=4)
    assert model.training is training


def test_bf16_losses_are_near_and_not_equal(model, windows):
    exact, rough = (window_losses(model, windows, micro_batch=4, precision=precision) for precision in ("fp32", "bf16"))
    assert 1e-5 < np.abs(rough - exact).max() < 0.2


@pytest.mark.parametrize("length", [0, 1, 2, T, T + 1, T + 2, 3 * T + 1, 50])
def test_every_token_but_the_first_is_a_target_once(length):
    tokens = np.arange(100, 100 + length, dtype=np.uint16)
    windows, targets = consecutive_windows(tokens, T)
    scored = [token for window, count in zip(windows, targets, strict=True) for token in window[1 : count + 1]]
    assert scored == list(tokens[1:])
    assert windows.dtype == np.uint16
    assert windows.shape == (len(targets), T + 1)


def test_document_losses_equal_a_loop_over_documents_and_windows(model):
    generator = np.random.default_rng(1)
    documents = [generator.integers(0, V, length).astype(np.uint16) for length in (2, 40, T + 1, 1, T, 25)]
    expected = [
        sum(slow_losses(model, document[start : start + T + 1]).sum() for start in range(0, len(document) - 1, T))
        for document in documents
    ]
    totals = list(document_losses(model, documents, T, micro_batch=1))  # 8 windows held: several passes
    np.testing.assert_allclose([loss for loss, _ in totals], expected, atol=1e-4)
    assert [count for _, count in totals] == [len(document) - 1 for document in documents]


def test_windows_of_distinct_papers_have_the_textbook_error():
    losses = np.random.default_rng(2).normal(size=(50, 3))
    mean, se = mean_and_se(losses)
    np.testing.assert_allclose(mean, losses.mean(axis=0))
    np.testing.assert_allclose(se, losses.std(axis=0, ddof=1) / np.sqrt(50))


def test_repeating_every_window_does_not_shrink_the_error():
    losses = np.random.default_rng(3).normal(size=(40, 5))
    _, once = mean_and_se(losses, np.arange(40))
    _, thrice = mean_and_se(np.repeat(losses, 3, axis=0), np.repeat(np.arange(40), 3))
    np.testing.assert_allclose(thrice, once)


def test_the_error_is_the_spread_of_repeated_experiments():
    """Papers that differ (sd 1), windows drawn with replacement that differ within them (sd 1)."""
    generator = np.random.default_rng(4)
    means, errors = [], []
    for _ in range(2000):
        of = generator.integers(0, 30, 120)
        losses = generator.normal(size=30)[of] + generator.normal(size=120)
        mean, se = mean_and_se(losses, of)
        means.append(mean)
        errors.append(se)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(means), rel=0.05)


def test_a_single_paper_has_no_error():
    mean, se = mean_and_se(np.array([1.0, 3.0]), np.array([7, 7]))
    assert mean == 2.0
    assert np.isnan(se)


def test_a_ratio_weighs_documents_by_their_tokens():
    mean, se = ratio_and_se(np.array([2.0, 12.0]), np.array([1, 3]))
    assert mean == 3.5
    assert se == pytest.approx(np.sqrt(2 * (1.5**2 + 1.5**2)) / 4)


@pytest.mark.parametrize("num_positions", [1, 2, 7, 64, 100, 2048])
def test_bins_cover_every_position_once(num_positions):
    bins = context_bins(num_positions)
    assert [position for start, stop in bins for position in range(start, stop)] == list(range(num_positions))
    assert bins[0] == (0, 1)
    widths = [stop - start for start, stop in bins]
    assert widths[-1:] >= widths[-2:-1]


def test_binned_is_the_mean_of_each_bin():
    values = np.array([[1.0, 2.0, 4.0], [3.0, 0.0, 1.0]])
    np.testing.assert_array_equal(binned(values, [(0, 1), (1, 3)]), [[1.0, 3.0], [3.0, 0.5]])
