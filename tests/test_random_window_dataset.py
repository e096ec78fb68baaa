import dataclasses
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import draws
from lm.micro_batches import Loader, rows_of_step
from lm.papers import read_papers
from random_window_dataset import RandomWindowDataset, choose_categories


@pytest.fixture(scope="module")
def papers(papers_dir):
    return read_papers(papers_dir)


def changed(papers, **changes):
    return dataclasses.replace(papers, **changes)


def with_lengths(papers, lengths):
    """The same tokens as papers of these lengths, all in the train split."""
    lengths = np.array(lengths)
    count = len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return changed(
        papers,
        lengths=lengths,
        offsets=offsets,
        paper_ids=[f"train_{i}" for i in range(count)],
        categories=np.arange(count) % len(papers.category_names),
        splits={"train": np.arange(count)},
    )


def test_window_never_crosses_a_paper(papers):
    dataset = RandomWindowDataset(papers, "train", sequence_length=1000)
    paper, first = dataset.locate(0, 20_000)
    assert first.min() == 0
    assert np.all(first + 1001 <= papers.lengths[paper])
    assert np.any(first + 1001 == papers.lengths[paper]), "the last window of a paper is drawn too"
    windows = dataset.windows(0, 200)
    for row in range(200):
        start = papers.offsets[paper[row]] + first[row]
        assert np.array_equal(windows[row], papers.tokens[start : start + 1001])


def test_papers_shorter_than_a_window_are_left_out_and_counted(papers):
    lengths = [10, 101, 100, 500]
    two = changed(with_lengths(papers, lengths), categories=np.array([0, 0, 1, 1]), category_names=["a", "b"])
    dataset = RandomWindowDataset(two, "train", sequence_length=100)
    assert dataset.eligible.tolist() == [1, 3]
    assert len(dataset) == 2
    assert dataset.num_too_short == 2
    assert set(dataset.locate(0, 1000)[0].tolist()) == {1, 3}


def test_item_i_of_epoch_e_depends_on_nothing_else(papers_dir):
    one, two = (RandomWindowDataset(papers_dir, "train", seed=5) for _ in range(2))
    one.set_epoch(3)
    _ = [two.windows(start, 7) for start in range(20)]
    assert torch.equal(one[4], torch.from_numpy(two.windows(3 * len(two) + 4, 1)[0]))
    assert not np.array_equal(two.windows(0, 10), RandomWindowDataset(papers_dir, "train", seed=6).windows(0, 10))
    with pytest.raises(IndexError):
        one[len(one)]


@pytest.mark.parametrize(
    ("weighting", "shares"),
    [("paper", [0.5, 0.25, 0.25]), ("token", [2 / 7, 4 / 7, 1 / 7]), ("equal", [1 / 3, 1 / 3, 1 / 3])],
)
def test_categories_are_drawn_by_their_papers_tokens_or_equally(weighting, shares, papers):
    lengths = [200, 200, 800, 200]
    unequal = changed(with_lengths(papers, lengths), categories=np.array([0, 0, 1, 2]), category_names=["a", "b", "c"])
    dataset = RandomWindowDataset(unequal, "train", category_weighting=weighting)
    assert dataset.category_shares == pytest.approx(dict(zip("abc", shares, strict=True)))
    drawn = np.bincount(unequal.categories[dataset.locate(0, 100_000)[0]]) / 100_000
    assert np.abs(drawn - shares).max() < 0.01


def test_random_sampling_draws_papers_and_starts_uniformly_with_replacement(papers):
    dataset = RandomWindowDataset(with_lengths(papers, [300] * 50), "train", sequence_length=100)
    paper, first = dataset.locate(0, 200_000)
    assert np.abs(np.bincount(paper) / 4000 - 1).max() < 0.1
    assert sorted(set(first.tolist())) == list(range(200))
    assert np.abs(np.bincount(first) / 1000 - 1).max() < 0.2
    assert len(set(paper[:50].tolist())) < 50


def test_permutation_takes_every_paper_once_an_epoch_in_another_order(papers):
    dataset = RandomWindowDataset(with_lengths(papers, [300] * 50), "train", sampling="permutation")
    epochs = [dataset.locate(epoch * 50, 50)[0].tolist() for epoch in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert dataset.locate(40, 20)[0].tolist() == epochs[0][40:] + epochs[1][:10], "a batch may cross the end of an epoch"


@pytest.mark.parametrize("sampling", ["random", "permutation"])
def test_any_order_and_size_of_requests_gives_the_windows_of_one_request(sampling, papers):
    few = with_lengths(papers, [150, 300] * 25)  # so that epochs end within a request
    choice = {"sequence_length": 100, "sampling": sampling}
    whole, *places = RandomWindowDataset(few, "train", **choice).draw(0, 2000)

    @settings(deadline=None, max_examples=100)
    @given(st.lists(st.tuples(st.none() | st.integers(0, 1500), st.sampled_from([0, 1, 16, 24, 300]), st.integers(1, 5))))
    def law(requests):
        """Each begins somewhere or where the last one ended (None), and is followed by equal ones."""
        dataset, start = RandomWindowDataset(few, "train", **choice), 0
        for somewhere, count, repeats in requests:
            start = start if somewhere is None else somewhere
            for _ in range(repeats):
                if start + count > len(whole):
                    return
                windows, *found = dataset.draw(start, count)
                assert np.array_equal(windows, whole[start : start + count])
                assert np.array_equal(found, np.array(places)[:, start : start + count])
                start += count

    law()


def test_requests_in_order_are_drawn_together_and_single_ones_alone(papers, monkeypatch):
    drawn, uniforms = [], draws.uniforms
    monkeypatch.setattr(draws, "uniforms", lambda *about: drawn.append(about[2:]) or uniforms(*about))
    dataset = RandomWindowDataset(papers, "train")
    for start in [*range(0, 1024, 16), 5000, 5016, 5000, 7]:
        dataset.windows(start, 16)
    assert drawn == [(0, 512), (512, 512), (5000, 16), (5016, 512), (5000, 16), (7, 16)]


def test_an_id_outside_the_vocabulary_gives_way_to_another_paper_the_same_at_every_draw(papers, capsys):
    tokens = papers.tokens[:6000].copy()
    poor = with_lengths(changed(papers, tokens=tokens), [300] * 20)
    dataset = RandomWindowDataset(poor, "train", sequence_length=299)
    clean = dataset.windows(0, 100)
    tokens[300 * 7 + 11] = 65_000  # in paper 7
    replaced = dataset.windows(0, 100)
    rows = np.flatnonzero((clean != replaced).any(axis=1))
    assert rows.tolist() == np.flatnonzero(dataset.locate(0, 100)[0] == 7).tolist()
    assert len(rows) > 0
    assert np.array_equal(replaced[rows[0]], dataset.windows(int(rows[0]), 1)[0])
    assert "paper train_7 has id 65000 at position 11, outside the vocabulary of 300" in capsys.readouterr().out


def test_data_of_another_vocabulary_is_refused_naming_paper_position_and_id(papers, papers_dir):
    dataset = RandomWindowDataset(papers_dir, "train", vocab_size=5)
    with pytest.raises(ValueError, match=r"paper train_\d+ has id \d+ at position \d+, outside the vocabulary of 5, and 10"):
        dataset.windows(0, 1)


def test_categories_are_nested_in_K_and_a_function_of_the_seed():
    names = ["d", "b", "a", "c", "e"]
    for seed in range(20):
        chosen = [choose_categories(names, K, seed) for K in range(1, 6)]
        assert all(set(few) < set(more) for few, more in itertools.pairwise(chosen))
        assert chosen[-1] == ["a", "b", "c", "d", "e"]
        assert choose_categories(names[::-1], 3, seed) == chosen[2]
    assert len({tuple(choose_categories(names, 2, seed)) for seed in range(50)}) == 10
    with pytest.raises(ValueError, match=r"--K 6, but the data has 5 categories \(a, b, c, d, e\)"):
        choose_categories(names, 6, 0)


def test_all_faults_are_named_together(papers):
    with pytest.raises(ValueError, match=r"(?s)category 'x'.*split 'dev'.*sequence_length 0.*sampling 'shuffle'") as error:
        RandomWindowDataset(papers, "dev", sequence_length=0, target_categories=["x", "objects"], sampling="shuffle")
    assert len(str(error.value).splitlines()) == 4
    short = with_lengths(papers, [500, 50, 500, 500])  # one paper of each category
    with pytest.raises(ValueError, match=r"no paper of objects in split 'train' has 101 tokens .1 papers are shorter."):
        RandomWindowDataset(short, "train")
    with pytest.raises(ValueError, match=r"no paper of objects in split 'train' has 100001 tokens .12 papers are shorter."):
        RandomWindowDataset(papers, "train", sequence_length=100_000, target_categories=["objects"])


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 24), (1, 2), (2, 3), (3, 4), (4, 6), (8, 1)])
def test_every_split_of_a_batch_makes_the_same_steps(processes, micro_batch, papers_dir):
    dataset = RandomWindowDataset(papers_dir, "train")
    grad_accum, rest = divmod(24, processes * micro_batch)
    assert rest == 0
    rows: dict[int, list[int]] = {step: [] for step in (5, 6)}
    for process in range(processes):
        accelerator = SimpleNamespace(device=torch.device("cpu"), process_index=process, num_processes=processes)
        loader = Loader(dataset.__getitems__, micro_batch, grad_accum, 0, accelerator)
        for step in rows:
            parts = rows_of_step(step, micro_batch, grad_accum, accelerator)
            rows[step] += [row for part in parts for row in part]
            for part, windows in zip(parts, loader.step(step), strict=True):
                assert np.array_equal(windows, dataset.windows(part.start, micro_batch))
    assert {step: sorted(found) for step, found in rows.items()} == {5: list(range(120, 144)), 6: list(range(144, 168))}
