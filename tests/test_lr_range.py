import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lm import draws
from lm.loss import next_token_loss
from lm.lr_range import range_test, rates, smooth, suggest, valley
from lm.models import build_model
from lm.optim import make_optimizer
from lm.step import train_step

VOCABULARY = 61
BETA = 0.98
LRS = rates(1e-7, 10.0, 100)


def bowl(num_steps=100, lowest_at=1e-2, diverges=True):
    """Losses that fall from 10 to 2 around a learning rate of `lowest_at` / 10 and, if they do, explode beyond it."""
    lrs = rates(1e-7, 10.0, num_steps)
    losses = 2 + 8 / (1 + (lrs / (lowest_at / 10)) ** 2)
    return lrs, losses + (diverges * (lrs / lowest_at) ** 2)


def noise(count, seed):
    return 0.1 * np.random.default_rng(seed).standard_normal(count)


def test_rates_go_from_end_to_end_by_one_factor():
    assert rates(1e-3, 1e1, 5).tolist() == pytest.approx([1e-3, 1e-2, 1e-1, 1.0, 10.0], rel=1e-12)
    assert (rates(1e-7, 10.0, 100)[[0, -1]] == [1e-7, 10.0]).all()


def test_the_first_smoothed_loss_is_the_first_loss_and_a_flat_curve_stays_flat():
    assert smooth([3.0, 5.0, 4.0], 0.5).tolist() == pytest.approx([3.0, (3 + 2 * 5) / 3, (3 + 2 * 5 + 4 * 4) / 7])
    assert smooth([4.25] * 50, 0.98).tolist() == pytest.approx([4.25] * 50)
    assert smooth([3.0, 5.0, 4.0], 0.0).tolist() == [3.0, 5.0, 4.0]


def longest_descent_by_brute_force(losses):
    """The first index at which a longest strictly falling subsequence ends, and its length, among all subsequences."""
    best = (0, 0)
    for end in range(len(losses)):
        for length in range(end + 1, best[1], -1):
            before = (c for c in itertools.combinations(range(end), length - 1))
            chains = ([*c, end] for c in before)
            if any(all(losses[a] > losses[b] for a, b in itertools.pairwise(chain)) for chain in chains):
                best = (end, length)
                break
    return best


@pytest.mark.parametrize("seed", range(20))
def test_the_valley_is_the_middle_of_the_longest_descent_among_all(seed):
    losses = np.random.default_rng(seed).integers(0, 9, 9).tolist()
    end, length = longest_descent_by_brute_force(losses)
    third = length / 3
    assert valley(losses) == end - length + int(third) + int(third / 2)


def test_the_three_suggestions_of_a_curve_without_smoothing():
    lrs, losses = bowl()
    found = suggest(lrs, losses, 100, beta=0.0)
    slope = np.gradient(losses, np.log(lrs))
    assert (found.refusal, found.warning) == (None, None)
    assert found.steepest == lrs[slope[10:-5].argmin() + 10]  # by hand: the middle of the bowl's wall, 1e-3
    assert found.steepest == pytest.approx(1e-3, rel=0.2)
    assert found.minimum_tenth == lrs[losses.argmin()] / 10
    end, start = int(losses.argmin()), 10 - 1  # it falls from the first point that is kept on; fastai counts one too many
    assert found.valley == lrs[start + int((end - start) / 3) + int((end - start) / 6)]


def test_suggestions_come_before_the_divergence_though_the_losses_are_noisy():
    lrs, losses = bowl()
    kept = losses < 40
    found = suggest(lrs[kept], losses[kept] + noise(int(kept.sum()), 0), 100, BETA)
    assert found.refusal is None
    assert all(1e-4 < lr < 3e-2 for lr in (found.steepest, found.valley, found.minimum_tenth * 10))


@pytest.mark.parametrize("beta", [0.9, 0.98])
def test_noise_alone_is_refused(beta):
    falls = [suggest(LRS, 5 + noise(100, seed), 100, beta) for seed in range(1000)]
    assert sum(found.refusal is None for found in falls) <= 15
    refused = next(found for found in falls if found.refusal)
    assert refused.refusal.startswith("the smoothed loss never fell clearly (from 5.0")
    assert (refused.steepest, refused.valley, refused.minimum_tenth) == (None, None, None)


def test_a_small_fall_above_the_noise_is_not_refused():
    losses = 5 - 1.0 / (1 + (1e-3 / LRS)) + noise(100, 0)
    assert suggest(LRS, losses, 100, BETA).refusal is None


def test_a_curve_that_only_rises_is_refused():
    found = suggest(LRS, 4 + np.linspace(0, 3, 100), 100, BETA)
    assert "the smoothed loss never fell clearly (from 4." in found.refusal


@pytest.mark.parametrize("made", [0, 1, 24])
def test_a_curve_that_diverges_at_once_is_refused(made):
    lrs, losses = bowl()
    found = suggest(lrs[:made], losses[:made], 100, BETA)
    assert found.refusal.startswith(f"the loss diverged after {made} steps of 100, 25 are needed: lower --min_lr")
    assert (found.steepest, found.valley, found.minimum_tenth) == (None, None, None)


def test_a_minimum_at_the_end_of_the_range_is_warned_of():
    lrs, losses = bowl(lowest_at=1e3, diverges=False)
    assert suggest(lrs, losses, 100, BETA).warning.startswith("the smoothed loss was lowest at the end: raise --max_lr")
    assert suggest(*bowl(), 100, 0.0).warning is None


def test_a_smoothed_minimum_far_behind_that_of_the_losses_is_warned_of():
    lrs, losses = bowl()
    losses = np.minimum(losses, 3.0 + 7.0 * (lrs < 1e-3))  # beyond the minimum it stays a little higher for long
    found = suggest(lrs, losses, 100, BETA)
    lowest = lrs[losses.argmin()]
    assert found.minimum_tenth > lowest
    assert found.warning.startswith(f"the losses themselves were lowest at {lowest:.2g}, which the smoothed ones follow late")


def endless(accum=2):
    """Steps of `accum` micro-batches of 3 rows with 8 targets."""
    for step in itertools.count():
        ids = torch.from_numpy(draws.integers(5, "rows", step * 100, 100).astype(np.int64) % 7)[: accum * 3 * 3]
        yield [part.reshape(3, 12)[:, :9] for part in ids.chunk(accum)], accum * 3 * 8.0


def kit(optimizer="adamw"):
    """A real model with dropout that has made two steps, so that its optimizer has something to remember."""
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True)
    model = build_model("neox-64x2", VOCABULARY, 16)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    model, optimizer = accelerator.prepare(model, make_optimizer(optimizer, model, 1e-3, (0.9, 0.99), 1e-8, 0.1))
    for micro_batches, weight in itertools.islice(endless(), 2):
        assert train_step(accelerator, model, optimizer, micro_batches, next_token_loss, weight, 1e-3, 1.0).applied
    return accelerator, model, optimizer


def copied(model, optimizer):
    """Every tensor and number of model, optimizer and generator, as bytes."""

    def bytes_of(value):
        if isinstance(value, torch.Tensor):
            return value.detach().clone().contiguous().view(-1).view(torch.uint8).tolist() if value.numel() else []
        if isinstance(value, dict):
            return {str(key): bytes_of(item) for key, item in value.items()}
        return [bytes_of(item) for item in value] if isinstance(value, list | tuple) else value

    everything = {"weights": model.state_dict(), "optimizer": optimizer.state_dict(), "drawn": torch.get_rng_state()}
    return bytes_of(everything), [p.grad for p in model.parameters()]


def tried(kit, steps, diverged=4.0, seed=0):
    """The curve of a test of 30 steps."""
    return range_test(*kit, steps, next_token_loss, rates(1e-5, 10.0, 30), 1.0, beta=0.5, diverged=diverged, seed=seed)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "muon", "sgd"])
def test_weights_optimizer_and_generator_are_untouched_bit_for_bit(optimizer):
    accelerator, model, optimizer = kit(optimizer)
    before = copied(model, optimizer)
    curve = tried((accelerator, model, optimizer), endless())
    assert min(curve.losses) < curve.losses[0] - 0.1  # it has trained in between
    assert copied(model, optimizer) == before


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adafactor", "muon", "sgd"])
def test_a_step_after_the_test_is_that_of_a_model_that_was_not_tested(optimizer):
    results = []
    for tested in (False, True):
        accelerator, model, made = kit(optimizer)
        if tested:
            tried((accelerator, model, made), endless())
        micro_batches, weight = next(itertools.islice(endless(), 7, None))
        train_step(accelerator, model, made, micro_batches, next_token_loss, weight, 1e-3, 1.0)
        results.append(copied(model, made))
    assert results[0] == results[1]


def test_they_are_untouched_after_an_error_too():
    accelerator, model, optimizer = kit()
    before = copied(model, optimizer)
    with pytest.raises(StopIteration):
        tried((accelerator, model, optimizer), itertools.islice(endless(), 5))
    assert copied(model, optimizer) == before


def test_every_step_is_the_exact_step_of_a_trainer_at_its_learning_rate():
    curve = tried(kit(), endless(), seed=11)
    accelerator, model, optimizer = kit()
    losses, norms = [], []
    for step, (lr, (micro_batches, weight)) in enumerate(zip(curve.lrs, endless(), strict=False)):
        torch.manual_seed(draws.torch_seed(11, step, 0))
        made = train_step(accelerator, model, optimizer, micro_batches, next_token_loss, weight, lr, 1.0)
        losses.append(made.loss)
        norms.append(made.grad_norm)
    assert (curve.losses, curve.grad_norms) == (losses, norms)
    assert curve.lrs == rates(1e-5, 10.0, 30)[: len(losses)].tolist()
    assert losses != tried(kit(), endless(), seed=12).losses  # of other dropout


def test_it_stops_when_the_smoothed_loss_is_several_times_its_minimum_not_at_one_high_loss():
    curves = []
    for beta in (0.0, 0.9):
        calls = itertools.count()

        def spiked(model, ids, calls=calls):
            loss, finite = next_token_loss(model, ids)
            return loss * (2 if next(calls) // 2 == 5 else 1), finite

        lrs = rates(1e-7, 1e-6, 12)
        curves.append(range_test(*kit(), endless(), spiked, lrs, 1.0, beta=beta, diverged=1.5, seed=0))
    assert [len(curve.losses) for curve in curves] == [6, 12]
    assert [curve.stopped for curve in curves] == ["the smoothed loss was more than 1.5 times its minimum", None]


def test_it_stops_at_a_loss_that_is_not_finite_and_keeps_what_was_before():
    accelerator, model, optimizer = kit()
    before = copied(model, optimizer)

    calls = itertools.count()

    def poisoned(made, ids):
        loss, finite = next_token_loss(made, ids)
        return loss * (math.nan if next(calls) >= 8 else 1.0), finite

    curve = range_test(
        accelerator, model, optimizer, endless(), poisoned, rates(1e-5, 1e-3, 30), 1.0, beta=0.9, diverged=4.0, seed=0
    )
    assert len(curve.losses) == len(curve.lrs) == len(curve.grad_norms) == 4
    assert curve.stopped == "step 5 had a loss or gradient that is not finite"
    assert copied(model, optimizer) == before


def test_max_grad_norm_0_clips_nothing():
    options = {"beta": 0.5, "diverged": 4.0, "seed": 0}
    curves = [
        range_test(*kit("sgd"), endless(), next_token_loss, rates(1e-3, 1.0, 20), norm, **options) for norm in (0, 1e9, 1e-3)
    ]
    assert curves[0].losses == curves[1].losses != curves[2].losses
