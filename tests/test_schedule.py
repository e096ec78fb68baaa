import math

import pytest
import torch

from lm.schedule import evaluations_since_best, lr_factor, plateau_factor


def torch_rates(scheduler_of, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_no_update_has_a_learning_rate_of_zero_and_the_warm_up_ends_at_the_peak(schedule):
    rates = [lr_factor(step, 50, 10, schedule, 0.1) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert min(rates) > 0
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_cosine_and_linear_are_torchs():
    cosine = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.1), 41)
    assert [lr_factor(step, 41, 0, "cosine", 0.1) for step in range(41)] == pytest.approx(cosine)
    linear = torch_rates(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=40), 41)
    assert [lr_factor(step, 41, 0, "linear", 0.1) for step in range(41)] == pytest.approx(linear)


def test_a_step_past_the_end_stays_at_the_end():
    assert lr_factor(1000, 41, 0, "cosine", 0.1) == pytest.approx(0.1)
    assert lr_factor(0, 1, 0, "linear", 0.0) == 1.0


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_the_plateau_is_torchs_reduce_lr_on_plateau(patience):
    losses = [3.0, 2.0, 2.5, 2.4, 2.1, 1.9, 1.9, 1.95, 2.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=patience, threshold=0.0, eps=0.0)
    for number, loss in enumerate(losses, 1):
        scheduler.step(loss)
        assert plateau_factor(losses[:number], 0.5, patience) == optimizer.param_groups[0]["lr"]
    assert plateau_factor(losses, 1.0, patience) == 1.0


def test_evaluations_since_best_counts_from_the_first_lowest():
    assert [evaluations_since_best(x) for x in ([], [3], [3, 2], [3, 2, 2], [1, 2, 3])] == [0, 0, 0, 1, 2]
    assert math.isfinite(lr_factor(0, 0, 0, "constant"))
