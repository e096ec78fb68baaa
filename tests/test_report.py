"""The report of synthetic runs whose excess is known exactly: ideal predictors of mixed memoryless sources.

Source c emits 1 with probability q_c. Given n tokens with j ones, an ideal predictor of the mixture weighs the sources by
p_c q_c^j (1 - q_c)^(n - j), so that its expected loss at each position is a sum over j, with no sampling.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from lm.evaluation import Evaluation, position_record, read_evaluation, write_evaluation
from lm.excess import area, area_above_tail, bound, entropy, over_categories, over_runs, tail_mean
from report import main

T, N = 40, 12
SOURCES = {"math.A": 0.05, "math.B": 0.35, "math.C": 0.7, "math.D": 0.9}


def counts(n: int, q: float) -> np.ndarray:
    """P(j ones among n tokens of a source), j = 0 .. n."""
    return np.array([math.comb(n, j) * q**j * (1 - q) ** (n - j) for j in range(n + 1)])


def ideal_losses(shares: dict[str, float]) -> dict[str, np.ndarray]:
    """For each source the expected loss, given 1 .. T tokens of it, of an ideal predictor of the mixture."""
    losses = {name: np.empty(T) for name in shares}
    for n in range(1, T + 1):
        ones = np.arange(n + 1)
        weights = np.array([p * SOURCES[c] ** ones * (1 - SOURCES[c]) ** (n - ones) for c, p in shares.items()])
        predicted = np.array([SOURCES[c] for c in shares]) @ (weights / weights.sum(axis=0))
        for c, curve in losses.items():
            q = SOURCES[c]
            curve[n - 1] = counts(n, q) @ -(q * np.log(predicted) + (1 - q) * np.log1p(-predicted))
    return losses


def exact_area(shares: dict[str, float], c: str) -> float:
    """By the chain rule: E_c ln P_c / P_mix over T + 1 tokens, less that of the first token, which is no target."""

    def divergence(n: int) -> float:
        ones = np.arange(n + 1)
        like = {k: SOURCES[k] ** ones * (1 - SOURCES[k]) ** (n - ones) for k in shares}
        return counts(n, SOURCES[c]) @ np.log(like[c] / sum(p * like[k] for k, p in shares.items()))

    return float(divergence(T + 1) - divergence(1))


def write_run(
    root: Path,
    shares: dict[str, float],
    seed: int = 0,
    offset: float = 0.0,
    name: str | None = None,
    num_tokens: int = 1000,
    **settings: object,
) -> Path:
    """A run whose losses are ideal plus `offset`, plus what depends on the text alone: large, and the same in every run."""
    folder = root / (name or f"K{len(shares)}_seed{seed}")
    folder.mkdir(parents=True)
    args = {"K": len(shares), "seed": seed, "model": "neox", "sequence_length": T, "category_weighting": "paper"} | settings
    derived = {"categories": list(shares), "category_shares": shares, "tokens_per_step": 100}
    (folder / "run.json").write_text(json.dumps({"args": args, "derived": derived}))
    losses, papers, records = {}, {}, {}
    for c, curve in ideal_losses(shares).items():
        generator = np.random.default_rng(list(SOURCES).index(c))
        losses[c], papers[c] = curve + offset + generator.normal(size=(N, T)), generator.integers(0, 5, N)
        score = {"loss": float(curve.mean() + offset), "loss_se": 0.01, "num_tokens": 1000}
        records[c] = position_record(losses[c], papers[c]) | score
    measured = {"data": "d", "tokenizer": "t", "sequence_length": T, "num_windows": N, "seed": 0, "precision": "fp32"}
    record = {"categories": records, "step": num_tokens // 100, "measured": measured}
    write_evaluation(folder / "evaluation" / "final_test.json", Evaluation(record=record, losses=losses, papers=papers))
    return folder


def report(root: Path, *flags: str) -> dict:
    main(["ergodic", str(root), *flags])
    return json.loads((root / "report" / "report.json").read_text())


def write_experiment(root: Path, shares: dict[str, float], **mixture: object) -> None:
    for c in shares:
        write_run(root, {c: 1.0}, name=f"K1_{c}")
    write_run(root, shares, **mixture)


SHARES = {"math.A": 0.4, "math.B": 0.3, "math.C": 0.2, "math.D": 0.1}


def test_area_of_ideal_predictors_is_exact_and_below_ln_k(tmp_path):
    write_experiment(tmp_path, SHARES)
    row = report(tmp_path)["K"]["4"]
    expected = sum(p * exact_area(SHARES, c) for c, p in SHARES.items())
    entropy_of_shares = -sum(p * math.log(p) for p in SHARES.values())
    assert row["area"]["value"] == pytest.approx(expected, abs=1e-5)
    assert row["H"]["value"] == pytest.approx(entropy_of_shares)
    assert row["bound"]["value"] == pytest.approx(entropy_of_shares)
    assert 0.5 < row["area_above_tail"]["value"] < row["area"]["value"] < entropy_of_shares < math.log(4)


def test_each_source_alone_stays_below_minus_ln_its_share():
    for c, p in SHARES.items():
        assert 0 < exact_area(SHARES, c) < -math.log(p)


def test_what_the_text_alone_decides_drops_out_of_the_excess(tmp_path):
    """The windows' own spread is about 1 nat; the excess of the same windows has none."""
    write_experiment(tmp_path, SHARES)
    row = report(tmp_path)["K"]["4"]
    assert row["tail_loss"]["se"] > 0.02
    assert row["area"]["se"] == pytest.approx(0.0, abs=1e-5)


def test_the_curve_is_the_exact_excess_at_each_context_length(tmp_path):
    write_experiment(tmp_path, SHARES)
    answer = report(tmp_path)
    mixed, alone = ideal_losses(SHARES), {c: ideal_losses({c: 1.0})[c] for c in SHARES}
    exact = sum(p * (mixed[c] - alone[c]) for c, p in SHARES.items())
    assert answer["context"][:4] == [1, 2, 3, 4]
    np.testing.assert_allclose(answer["K"]["4"]["excess_curve"]["value"][:4], exact[:4], atol=1e-5)
    assert answer["K"]["4"]["tail_excess"]["value"] == pytest.approx(exact[T // 2 :].mean(), abs=1e-5)


def test_a_model_that_is_worse_everywhere_has_the_same_area_above_the_tail(tmp_path):
    write_experiment(tmp_path / "ideal", SHARES)
    write_experiment(tmp_path / "worse", SHARES, offset=0.5)
    ideal, worse = (report(tmp_path / name)["K"]["4"] for name in ("ideal", "worse"))
    assert worse["area"]["value"] - ideal["area"]["value"] == pytest.approx(0.5 * T, abs=1e-4)
    assert worse["area_above_tail"]["value"] == pytest.approx(ideal["area_above_tail"]["value"], abs=1e-4)


def test_excess_and_bound_are_over_the_categories_that_have_a_single_run(tmp_path):
    write_run(tmp_path, {"math.A": 1.0}, seed=0)
    write_run(tmp_path, {"math.D": 1.0}, seed=1)
    write_run(tmp_path, SHARES)
    answer = report(tmp_path)
    row = answer["K"]["4"]
    expected = 0.8 * exact_area(SHARES, "math.A") + 0.2 * exact_area(SHARES, "math.D")
    assert row["area"]["value"] == pytest.approx(expected, abs=1e-5)
    assert row["bound"]["value"] == pytest.approx(-0.8 * math.log(0.4) - 0.2 * math.log(0.1))
    assert answer["notes"] == [f"{tmp_path}/K4_seed0: no K = 1 run on math.B, math.C: excess and bound are over the others"]


def test_the_single_run_of_the_same_seed_is_preferred(tmp_path):
    for seed, offset in ((0, 0.1), (1, 0.2), (2, 0.4)):
        write_run(tmp_path, {"math.A": 1.0}, seed=seed, offset=offset)
    shares = {"math.A": 0.5, "math.B": 0.5}
    write_run(tmp_path, shares, seed=1)
    write_run(tmp_path, shares, seed=7)
    areas = [run["area"]["value"] for run in report(tmp_path)["runs"] if run["K"] == 2]
    exact = exact_area(shares, "math.A")
    np.testing.assert_allclose(areas, [exact - 0.2 * T, exact - T * (0.1 + 0.2 + 0.4) / 3], atol=1e-4)


def test_errors_are_between_seeds_where_there_are_several(tmp_path):
    for seed, offset in enumerate((0.0, 0.1, 0.5)):
        write_run(tmp_path, {"math.A": 1.0}, seed=seed)
        write_run(tmp_path, {"math.A": 0.5, "math.B": 0.5}, seed=seed, offset=offset)
    answer = report(tmp_path)["K"]["2"]
    assert answer["num_runs"] == 3
    assert answer["tail_excess"]["se"] == pytest.approx(np.std([0.0, 0.1, 0.5], ddof=1) / math.sqrt(3), abs=1e-5)


def test_report_files_and_finding(tmp_path, capsys):
    write_experiment(tmp_path, SHARES)
    answer = report(tmp_path)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == answer["finding"]
    assert "nats, below the 1.280 that" in answer["finding"]
    written = (tmp_path / "report" / "report.md").read_text()
    assert answer["finding"] in written
    for name in ("context_loss", "excess", "loss_against_k"):
        assert f"report/{name}.png" in printed
        assert f"({name}.png)" in written
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_without_single_runs_curves_are_drawn_and_the_excess_is_left_out(tmp_path):
    write_run(tmp_path, SHARES)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "excess.png").write_bytes(b"of an earlier report")
    answer = report(tmp_path)
    assert "area" not in answer["K"]["4"]
    assert answer["notes"][0].startswith("no K = 1 run: the excess is left out")
    assert answer["finding"].startswith("Finding: no excess")
    assert sorted(path.name for path in (tmp_path / "report").glob("*.png")) == ["context_loss.png", "loss_against_k.png"]


def test_runs_without_an_evaluation_are_named_and_left_out(tmp_path):
    write_experiment(tmp_path, SHARES)
    unfinished = write_run(tmp_path, SHARES, seed=8)
    unevaluated = write_run(tmp_path, SHARES, seed=9)
    for folder in (unfinished, unevaluated):
        (folder / "evaluation" / "final_test.json").unlink()
    (unevaluated / "final").mkdir()
    answer = report(tmp_path)
    assert answer["K"]["4"]["num_runs"] == 1
    command = f"python evaluate_model.py context {unevaluated} --checkpoint final --split test"
    assert answer["notes"] == [
        f"left out: {unfinished} is not finished: run its train.py command again",
        f"left out: {unevaluated} is not evaluated: {command}",
    ]


def test_different_budgets_are_said(tmp_path):
    write_run(tmp_path, {"math.A": 1.0}, num_tokens=1000)
    write_run(tmp_path, {"math.A": 0.5, "math.B": 0.5}, num_tokens=2000)
    assert any("different numbers of tokens" in note and "K2_seed0 2,000" in note for note in report(tmp_path)["notes"])


def test_runs_of_other_settings_are_refused_and_named(tmp_path):
    write_run(tmp_path, {"math.A": 1.0})
    write_run(tmp_path, SHARES, model="other")
    write_run(tmp_path, SHARES, name="again", model="other")
    models = rf"model differs: neox in {tmp_path}/K1_seed0; other in {tmp_path}/K4_seed0, {tmp_path}/again"
    twice = rf"math.A, math.B, math.C, math.D with seed 0 is there twice: {tmp_path}/K4_seed0, {tmp_path}/again"
    with pytest.raises(ValueError, match=rf"{models}\n{twice}\nruns of one experiment are needed"):
        report(tmp_path)


def test_runs_measured_on_other_windows_are_refused(tmp_path):
    write_run(tmp_path, {"math.A": 1.0})
    folder = write_run(tmp_path, {"math.A": 0.5, "math.B": 0.5})
    there = read_evaluation(folder / "evaluation" / "final_test.json")
    write_evaluation(
        folder / "evaluation" / "final_test.json",
        Evaluation(record=there.record, losses=there.losses, papers={c: x + 1 for c, x in there.papers.items()}),
    )
    with pytest.raises(ValueError, match=r"K1_seed0 and .*K2_seed0 differ in their windows"):
        report(tmp_path)


def test_no_runs_and_no_evaluations_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing"):
        report(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no run.json of train.py below"):
        report(tmp_path)
    folder = write_run(tmp_path, SHARES)
    with pytest.raises(FileNotFoundError, match=rf"python evaluate_model.py context {folder} --checkpoint best --split test"):
        report(tmp_path, "--checkpoint", "best")


def test_areas_tails_and_bounds():
    values = np.array([[9.0, 7.0, 3.0, 5.0]])
    assert tail_mean(values) == [4.0]
    assert area(values) == [24.0]
    assert area_above_tail(values) == [8.0]
    assert tail_mean(values[:, :3]) == [5.0]
    assert tail_mean(values[:, :1]) == [9.0]
    assert entropy({"a": 0.25, "b": 0.25, "c": 0.5}) == pytest.approx(1.5 * math.log(2))
    assert bound({"a": 0.25, "b": 0.75}, {"a": 1.0}) == pytest.approx(math.log(4))


def test_errors_of_categories_add_as_independent_ones():
    values = {"a": np.array([1.0, 3.0]), "b": np.array([0.0, 0.0, 6.0]), "unused": np.array([9.0])}
    papers = {name: np.arange(len(x)) for name, x in values.items()}
    mean, se = over_categories(values, papers, {"a": 0.25, "b": 0.75})
    assert mean == 2.0
    assert se == pytest.approx(math.hypot(0.25 * 1.0, 0.75 * 2.0))


def test_one_run_keeps_the_error_over_windows():
    assert over_runs(np.array([2.0]), np.array([0.3])) == (2.0, 0.3)
    assert over_runs(np.array([1.0, 3.0]), np.array([0.3, 0.3])) == (2.0, pytest.approx(1.0))
