"""Measures of multiple choice equal what is worked out by hand, at the edges of floating point too."""

import math

import pytest

from lm.choice_measures import Choices, chance, macro_average, mean_measures, measures_of

INF = math.inf


def choices(right: int, log_likelihoods: list[float], chars: list[int] | None = None, **more) -> Choices:
    ones = [1] * len(log_likelihoods)
    return Choices(right=right, log_likelihoods=log_likelihoods, num_chars=chars or ones, **{"num_tokens": ones, **more})


def log(*values: float) -> list[float]:
    return [math.log(value) for value in values]


def test_all_measures_of_one_question_equal_those_worked_out_by_hand():
    """P = (1/8, 1/4, 1/64) of choices of 3, 1 and 6 characters and 1, 2 and 3 tokens, the first right.

    Per character P is 1/2, 1/4, 1/2 (the first is chosen), per token 1/8, 1/2, 1/4; against "Answer:" alone, where they are
    1/16, 1/2, 1/256, the gains are 2, 1/2 and 4.
    """
    asked = choices(0, log(1 / 8, 1 / 4, 1 / 64), [3, 1, 6], num_tokens=[1, 2, 3], unconditional=log(1 / 16, 1 / 2, 1 / 256))
    expected = {
        "acc_raw": 0,
        "acc_per_token": 0,
        "acc_per_char": 1,
        "acc_uncond": 0,
        "correct_prob": 1 / 8,
        "margin": -1 / 8,
        "norm_correct_prob": 8 / 25,
        "total_prob": 25 / 64,
        "correct_prob_per_token": 1 / 8,
        "margin_per_token": -3 / 8,
        "norm_correct_prob_per_token": 1 / 7,
        "total_prob_per_token": 7 / 8,
        "correct_prob_per_char": 1 / 2,
        "margin_per_char": 0,
        "norm_correct_prob_per_char": 2 / 5,
        "total_prob_per_char": 5 / 4,
    }
    assert measures_of(asked) == pytest.approx(expected, abs=1e-15)


def test_the_first_of_equal_choices_is_the_chosen_one():
    first, second = (measures_of(choices(right, log(1 / 4, 1 / 4), unconditional=log(1 / 2, 1 / 2))) for right in (0, 1))
    for name in ("acc_raw", "acc_per_token", "acc_per_char", "acc_uncond"):
        assert (first[name], second[name]) == (1.0, 0.0)
    assert first["norm_correct_prob"] == second["norm_correct_prob"] == 0.5
    assert first["margin"] == second["margin"] == 0.0


def test_a_choice_of_one_character_counts_as_it_is():
    found = measures_of(choices(1, log(1 / 4, 1 / 2), [1, 1]))
    assert [found[f"{name}_per_char"] for name in ("correct_prob", "margin", "norm_correct_prob", "total_prob")] == (
        pytest.approx([1 / 2, 1 / 4, 2 / 3, 3 / 4])
    )


def test_likelihoods_too_small_for_a_float_keep_their_ratio():
    found = measures_of(choices(0, [-800.0, -800.0 - math.log(3)], [400, 400]))
    assert (found["acc_raw"], found["correct_prob"], found["margin"], found["total_prob"]) == (1.0, 0.0, 0.0, 0.0)
    assert found["norm_correct_prob"] == pytest.approx(3 / 4)
    assert found["correct_prob_per_char"] == pytest.approx(math.exp(-2))
    assert found["norm_correct_prob_per_char"] == pytest.approx(1 / (1 + 3 ** (-1 / 400)))


@pytest.mark.parametrize(
    ("log_likelihoods", "unconditional", "accuracy", "uncond", "share"),
    [
        ([-INF, -1.0], [-1.0, -1.0], 0.0, 0.0, 0.0),
        ([-1.0, -INF], [-1.0, -INF], 1.0, 1.0, 1.0),
        ([-1.0, -2.0], [-3.0, -INF], 1.0, 0.0, 1 / (1 + math.exp(-1))),
        ([-INF, -INF], [-INF, -INF], 1.0, 1.0, 0.5),
    ],
)
def test_impossible_choices_give_numbers(log_likelihoods, unconditional, accuracy, uncond, share):
    found = measures_of(choices(0, log_likelihoods, [2, 5], unconditional=unconditional))
    assert not any(map(math.isnan, found.values()))
    assert (found["acc_raw"], found["acc_uncond"]) == (accuracy, uncond)
    assert found["norm_correct_prob"] == pytest.approx(share)


def test_means_stand_with_their_standard_errors_and_the_primary_measure_first():
    """Right, right, wrong: the mean is 2/3, the variance of the three 1/3."""
    asked = [choices(right, log(1 / 2, 1 / 4)) for right in (0, 0, 1)]
    found = mean_measures(asked, "acc_per_char")
    assert next(iter(found.items())) == ("primary_metric", {"value": pytest.approx(2 / 3), "se": pytest.approx(1 / 3)})
    assert found["acc_per_char"] == found["primary_metric"]
    assert found["margin"] == {"value": pytest.approx(1 / 12), "se": pytest.approx(math.sqrt(1 / 12) / math.sqrt(3))}
    assert "acc_uncond" not in found
    assert mean_measures(asked[:1], "acc_raw")["margin"] == {"value": 0.25, "se": None}


def test_the_macro_average_counts_each_part_alike():
    parts = [{"margin": {"value": 0.5, "se": 0.3}}, {"margin": {"value": 0.25, "se": 0.4}}]
    assert macro_average(parts) == {"margin": {"value": 0.375, "se": pytest.approx(0.25)}}
    parts.append({"margin": {"value": 0.0, "se": None}})
    assert macro_average(parts) == {"margin": {"value": 0.25, "se": None}}


def test_chance_is_one_over_the_choices_of_each_question():
    assert chance([choices(0, [-1.0] * 4), choices(0, [-1.0] * 2), choices(0, [-1.0] * 4)]) == pytest.approx(1 / 3)
