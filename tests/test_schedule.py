import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.schedule import Schedule, ScheduleName, evaluations_since_best, plateau_factor

NAMES = get_args(ScheduleName)


def factors(name, total_steps, **options):
    schedule = Schedule(name=name, total_steps=total_steps, **options)
    return [schedule.factor(step) for step in range(total_steps)]


def torch_rates(scheduler_of, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
    scheduler = scheduler_of(optimizer)
    rates, momenta = [], []
    for step in range(steps):
        if step:
            optimizer.step()
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
    return rates, momenta


schedules = st.builds(
    Schedule,
    name=st.sampled_from(NAMES),
    total_steps=st.integers(1, 60),
    warmup_steps=st.integers(0, 80),
    min_lr_ratio=st.floats(0, 1),
    pct_start=st.floats(0, 1),
    div_factor=st.floats(1, 1e3),
    final_div_factor=st.floats(1, 1e6),
    three_phase=st.booleans(),
    cycle_momentum=st.booleans(),
    decay_share=st.floats(0, 1),
    tokens_per_step=st.integers(1, 100),
    warmup_tokens=st.integers(0, 5000),
    decay_tokens=st.integers(1, 5000),
)


@given(schedule=schedules)
def test_every_schedule_is_between_0_and_the_peak_starts_above_0_and_stays_at_its_end(schedule):
    rates = [schedule.factor(step) for step in range(schedule.total_steps)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[0] > 0
    assert [schedule.factor(schedule.total_steps + more) for more in (0, 1, 10**6)] == [rates[-1]] * 3
    betas = [schedule.beta1(step) for step in range(schedule.total_steps + 3)]
    if schedule.name == "one_cycle" and schedule.cycle_momentum:
        assert all(0.85 <= beta <= 0.95 for beta in betas)
    else:
        assert set(betas) == {None}
    assert [schedule.factor(step) for step in reversed(range(schedule.total_steps))] == rates[::-1], "nothing was stepped"


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_no_update_has_a_learning_rate_of_zero_and_the_warm_up_ends_at_the_peak(name):
    rates = factors(name, 50, warmup_steps=10, min_lr_ratio=0.1)
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10] == 1.0
    assert min(rates) > 0
    assert rates[-1] == pytest.approx(1.0 if name == "constant" else 0.1)


def test_cosine_and_linear_are_torchs():
    cosine, _ = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40, eta_min=0.1), 41)
    assert factors("cosine", 41, min_lr_ratio=0.1) == pytest.approx(cosine)
    linear, _ = torch_rates(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=40), 41)
    assert factors("linear", 41, min_lr_ratio=0.1) == pytest.approx(linear)
    assert factors("linear", 5) == [1.0, 0.75, 0.5, 0.25, 0.0], "linear to zero"


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("pct_start", [0.0, 0.2, 0.3, 0.45, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("div_factor", "final_div_factor"), [(25.0, 1e4), (10.0, 1.0)])
def test_one_cycle_is_torchs_bit_for_bit(three_phase, pct_start, div_factor, final_div_factor):
    options = {"pct_start": pct_start, "div_factor": div_factor, "final_div_factor": final_div_factor}
    for total in (1, 2, 3, 4, 10, 97):
        schedule = Schedule(name="one_cycle", total_steps=total, three_phase=three_phase, cycle_momentum=True, **options)
        mine = [schedule.factor(step) for step in range(total)], [schedule.beta1(step) for step in range(total)]

        def torchs(optimizer, total=total):
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total, three_phase=three_phase, **options)

        if pct_start * total == 1:
            with pytest.raises(ZeroDivisionError):
                torch_rates(torchs, total)
            assert (mine[0][0], mine[1][0]) == (1.0, 0.85), "the one update of the first phase has the peak"
        else:
            assert mine == torch_rates(torchs, total)


def test_wsd_is_at_the_peak_until_its_last_steps_fall_in_a_line_to_the_end():
    assert factors("wsd", 20, warmup_steps=4, decay_share=0.2) == [0.25, 0.5, 0.75] + 13 * [1.0] + [0.75, 0.5, 0.25, 0.0]
    assert factors("wsd", 20, decay_share=0.2, min_lr_ratio=0.5)[15:] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert factors("wsd", 20, warmup_steps=4, decay_share=1.0) == factors("linear", 20, warmup_steps=4)
    assert factors("wsd", 20, warmup_steps=4, decay_share=0.0) == factors("constant", 20, warmup_steps=4)


def test_gpt3_counts_tokens_and_stays_at_a_tenth_however_long_the_run_is():
    """Warm-up over 375M tokens, a cosine to 10 % at 260B tokens; with 3.2M tokens a step, as the largest model."""
    schedule = Schedule(name="gpt3", total_steps=100_000, tokens_per_step=3_200_000, min_lr_ratio=0.1)
    assert schedule.factor(0) == 3.2e6 / 375e6
    assert schedule.factor(116) == 117 * 3.2e6 / 375e6 < schedule.factor(117) == 1.0
    half = (260e9 + 375e6) / 2 / 3.2e6
    assert schedule.factor(round(half)) == pytest.approx(0.55, abs=1e-5)
    assert schedule.factor(81_249) > 0.1
    assert [schedule.factor(step) for step in (81_250, 90_000, 10**9)] == pytest.approx([0.1] * 3, rel=1e-12)
    in_steps = factors("cosine", 61, warmup_steps=10, min_lr_ratio=0.1)
    assert factors("gpt3", 61, min_lr_ratio=0.1, tokens_per_step=7, warmup_tokens=70, decay_tokens=420) == in_steps


def test_a_step_past_the_end_stays_at_the_end():
    assert Schedule(name="cosine", total_steps=41, min_lr_ratio=0.1).factor(1000) == pytest.approx(0.1)
    assert Schedule(name="linear", total_steps=1).factor(0) == 1.0
    assert all(math.isfinite(Schedule(name=name, total_steps=0).factor(0)) for name in NAMES)


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
