import numpy as np

from lm import draws


def test_draws_depend_on_the_index_and_not_on_how_they_were_asked_for():
    whole = draws.integers(7, "window", 100, 50)
    parts = [draws.integers(7, "window", index, 1) for index in range(100, 150)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(draws.integers(7, "window", 2**40, 3)[1:], draws.integers(7, "window", 2**40 + 1, 2))


def test_draws_are_these_numbers_forever():
    assert draws.integers(0, "window", 0, 1).tolist() == [
        [5999027746612108016, 9356989332387968942, 16304648692305991141, 5679422198343795977]
    ]
    assert draws.permutation(0, "epoch/0", 8).tolist() == [4, 5, 1, 6, 2, 3, 7, 0]


def test_seeds_and_purposes_do_not_share_draws():
    streams = [draws.integers(seed, purpose, 0, 1000) for seed in (0, 1) for purpose in ("window", "torch/0")]
    assert len({value for stream in streams for value in stream.ravel().tolist()}) == 4 * 4000


def test_uniforms_are_uniform_and_below_one():
    values = draws.uniforms(3, "window", 0, 100_000)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(axis=0) - 0.5).max() < 5 * np.sqrt(1 / 12 / 100_000)
    assert np.abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 5 / np.sqrt(100_000)


def test_torch_seeds_differ_between_steps_and_processes():
    seeds = {draws.torch_seed(0, step, process) for step in range(100) for process in range(8)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**63 for seed in seeds)
