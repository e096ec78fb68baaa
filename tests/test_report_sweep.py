"""`report.py sweep` compares models each at its best learning rate: of records written by hand."""

import json

import matplotlib.image
import pytest
from test_report_pretrain import write_run

from lm.lr_sweep import compare, in_words, read_arms
from lm.pretraining import read_pretrainings
from report import main

LOSSES = {  # by model and learning rate, of seeds 0, 1, 2
    "plain": {0.001: (5.2, 5.3, 5.1), 0.002: (5.0, 5.1, 4.9), 0.004: (5.4, 5.2, 5.3)},
    "sine": {0.001: (5.1, 5.0, 5.2), 0.002: (4.95, 5.2, 5.0), 0.004: (4.9, 5.1, 4.85)},
}


def write(folder, losses=LOSSES, parameters=5000, **changes):
    """The runs of a sweep; each model has one parameter more than the one before."""
    return [
        write_run(
            folder / f"{model}-{lr}-{seed}",
            [(0, 10.0), (100, loss)],
            derived={"num_parameters": parameters + number, "tokens_per_step": 800},
            model=model,
            lr=lr,
            seed=seed,
            **changes,
        )
        for number, (model, by_lr) in enumerate(losses.items())
        for lr, of_seeds in by_lr.items()
        for seed, loss in enumerate(of_seeds)
    ]


def test_each_model_is_compared_at_its_own_best_rate_and_seed_by_seed(tmp_path):
    arms = read_arms(read_pretrainings(write(tmp_path)))
    assert [(arm.model, arm.parameters, arm.best_lr, arm.at_the_edge) for arm in arms] == [
        ("plain", 5000, 0.002, False),
        ("sine", 5001, 0.004, True),
    ]
    assert arms[0].mean(0.002) == pytest.approx((5.0, 0.1 / 3**0.5))
    plain, sine = compare(arms)
    assert plain["difference"] == (0, 0)
    assert sine["loss"][0] == pytest.approx(4.95)
    assert sine["difference"][0] == pytest.approx(-0.05)
    assert sine["difference"][1] == pytest.approx(0.028868, abs=1e-5)  # of -0.1, 0, -0.05
    said = in_words(arms, [plain, sine])
    assert said == [
        "sine at lr 0.004 ends 0.0500 +- 0.0289 nats per token lower than plain at lr 0.002 (3 seeds)",
        "warning: the best learning rate of sine, 0.004, is at the edge of the sweep: widen it",
    ]


def test_the_report_has_every_run_a_table_and_a_figure(tmp_path, capsys):
    folders = write(tmp_path / "runs")
    main(["sweep", *map(str, folders), f"--output_dir={tmp_path / 'report'}"])
    said = capsys.readouterr().out
    assert "| plain | 5,000" in said
    assert "0.0500 +- 0.0289 nats per token lower" in said
    each = [json.loads(line) for line in (tmp_path / "report/sweep.jsonl").read_text().splitlines()]
    assert len(each) == 18
    assert each[-1] == {"model": "sine", "lr": 0.004, "seed": 2, "loss": 4.85}
    written = json.loads((tmp_path / "report/sweep.json").read_text())
    assert written["tokens"] == 20_000
    assert written["models"][1]["best_lr"] == 0.004
    assert matplotlib.image.imread(tmp_path / "report/sweep.png").std() > 0.02


def test_what_would_make_the_comparison_unfair_is_refused_all_together(tmp_path):
    folders = write(tmp_path)
    other = write_run(tmp_path / "other", [(0, 10.0), (100, 5.0)], model="sine", lr=0.002, seed=7, weight_decay=0.3)
    again = write_run(tmp_path / "again", [(0, 10.0), (100, 5.0)], model="sine", lr=0.002, seed=1)
    half = write_run(tmp_path / "half", [(0, 10.0)], model="plain", lr=0.004, seed=3, finished=False)
    with pytest.raises(ValueError, match="differs from") as error:
        read_arms(read_pretrainings([*folders[1:], other, again, half]))
    said = str(error.value)
    assert f"{other} differs from {folders[1]} in weight_decay" in said
    assert f"{again} is a second run of sine, lr 0.002, seed 1" in said
    assert f"{half} is at step 0, not finished" in said
    assert "runs of plain are missing (the first: lr 0.001, seed 0)" in said
    assert "runs of sine are missing (the first: lr 0.004, seed 3)" in said


def diverge(folder):
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "diverged", "step": 50}\n')


def test_a_rate_at_which_a_run_diverged_is_shown_and_never_the_best(tmp_path, capsys):
    folders = write(tmp_path / "runs")
    diverge(tmp_path / "runs/sine-0.004-1")
    main(["sweep", *map(str, folders), f"--output_dir={tmp_path / 'report'}"])
    assert capsys.readouterr().out.splitlines()[3].split("|")[5].strip() == "diverged"
    written = json.loads((tmp_path / "report/sweep.json").read_text())
    assert written["models"][1]["best_lr"] == 0.002
    assert '"lr": 0.004, "seed": 1, "loss": null}' in (tmp_path / "report/sweep.jsonl").read_text()
    for lr in (0.001, 0.002):
        diverge(tmp_path / f"runs/sine-{lr}-0")
    with pytest.raises(ValueError, match="runs of sine diverged at each learning rate: try lower ones"):
        read_arms(read_pretrainings(folders))
