"""`report.py pretrain` says what the logs say: of records written by hand, whose curves can be compared in the head."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from lm.pretraining import by_setting, differences, read_pretrainings
from lm.token_savings import reached_at
from report import main, panels

SEQ_LEN = 100
BASE = [(0, 10.0), (100, 6.0), (200, 5.0), (300, 4.5), (400, 4.0)]  # blocks of C4 drawn, held-out loss on C4
GOOD = [(0, 9.0), (100, 5.0), (200, 4.5), (250, 4.0)]
POOR = [(0, 10.0), (100, 7.0), (200, 5.5), (300, 5.25)]
CHECKPOINT = "/S/pptrain/checkpoints/step_00012000"


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(
    folder: Path,
    curve: list[tuple[int, float]],
    checkpoint: str | None = None,
    mixin: float = 0.0,
    questions: list[tuple[float, float]] | None = None,
    train: list[dict] | None = None,
    finished: bool = True,
    derived: dict | None = None,
    **args: object,
) -> Path:
    """A run that was evaluated every 25 of 100 steps; `questions` are held-out accuracy and loss at each evaluation."""
    (folder / "logs").mkdir(parents=True)
    args = {"scratch_dir": "S", "output_dir": str(folder), "data_dir": "", "seed": 0, "lr": 0.001, "eval_every": 25} | args
    args |= {"mixin_percent": mixin, "pptrain_checkpoint": "latest" if checkpoint else "none"}
    known = {"effective_batch": 8, "seq_len": SEQ_LEN, "total_steps": 100, "num_parameters": 5000, "vocab_size": 512}
    derived = known | {"pptrain_checkpoint": checkpoint, "initial_weights": checkpoint, "pack": "c0ffee"} | (derived or {})
    (folder / "run.json").write_text(json.dumps({"script": "pretrain.py", "args": args, "derived": derived}))
    held_out = []
    for number, (blocks, loss) in enumerate(curve):
        accuracy, answer_loss = questions[number] if questions else (None, None)
        record = {"step": 25 * number, "c4_loss": loss, "heldout_acc": accuracy, "heldout_loss": answer_loss}
        held_out.append(record | {"c4_block_idx": blocks, "mixin_idx": 0})
    (folder / "logs/eval.jsonl").write_text(lines(held_out))
    (folder / "logs/train.jsonl").write_text(lines(train or []))
    if finished and held_out:
        (folder / "final").mkdir()
        (folder / "final/about.json").write_text(json.dumps({"step": held_out[-1]["step"]}))
    return folder


def report(*command: object) -> None:
    main([str(word) for word in ("pretrain", *command)])


def written(folder: Path) -> dict:
    return json.loads((folder / "pretrain.json").read_text())


def cells(said: str) -> list[list[str]]:
    """The table on the screen, without the line below its head."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines() if line.startswith("|")]
    return [rows[0], *rows[2:]]


def value(value: float | None, se: float | None = None) -> dict:
    return {"value": value, "se": se}


@pytest.fixture
def three_runs(tmp_path) -> list[Path]:
    """The baseline; one that saves tokens and is not finished; one that does not."""
    questions = [(0.875, 0.25), (0.5, 0.5), (0.25, 1.0), (0.375, 0.75)]
    good = write_run(tmp_path / "good", GOOD, CHECKPOINT, 0.02, questions, finished=False, data_dir="D/look8")
    return [write_run(tmp_path / "base", BASE), good, write_run(tmp_path / "poor", POOR, mixin=0.05)]


def test_savings_equal_those_computed_by_hand(three_runs, tmp_path, capsys):
    """At 25,000 tokens, which all have reached, the baseline is at 4.75: `good` was there at 15,000, `poor` is not yet."""
    report(*three_runs, "--output_dir", tmp_path / "out")
    found = written(tmp_path / "out")
    base = {"setting": "base", "runs": ["base"], "pptrain_checkpoint": None, "mixin_percent": 0.0, "c4_tokens": 40_000}
    base |= {"c4_loss": value(4.0), "c4_loss_at_equal_tokens": value(4.75), "difference": value(0.0)}
    base |= {"reached_at": 25_000.0, "tokens_saved": 0.0, "heldout_acc": value(None), "heldout_loss": value(None)}
    base |= {"finished": True, "step": 100, "total_steps": 100}
    good = {"setting": "good", "runs": ["good"], "pptrain_checkpoint": CHECKPOINT, "mixin_percent": 0.02, "c4_tokens": 25_000}
    good |= {"c4_loss": value(4.0), "c4_loss_at_equal_tokens": value(4.0), "difference": value(-0.75)}
    good |= {"reached_at": 15_000.0, "tokens_saved": 10_000.0, "heldout_acc": value(0.375), "heldout_loss": value(0.75)}
    good |= {"finished": False, "step": 75, "total_steps": 100}
    poor = {"setting": "poor", "runs": ["poor"], "mixin_percent": 0.05, "c4_tokens": 30_000, "c4_loss": value(5.25)}
    poor |= {"c4_loss_at_equal_tokens": value(5.375), "difference": value(0.625), "reached_at": None, "tokens_saved": None}
    assert found["settings"] == [base, good, base | poor | {"step": 75}]
    assert (found["equal_tokens"], found["notes"]) == (25_000, [])
    head = ["runs", "begun from", "mixin", "C4 tokens", "C4 loss", "at equal tokens", "difference", "tokens saved"]
    begun = "pptrain/checkpoints/step_00012000"
    said = capsys.readouterr().out
    assert cells(said) == [
        [*head, "right answers", "state"],
        ["base", "random weights", "0", "40,000", "4.000", "4.750", "0.000", "baseline", "-", "finished"],
        ["good", begun, "0.02", "25,000", "4.000", "4.000", "-0.750", "10,000 (40%)", "0.375", "step 75 of 100"],
        ["poor", "random weights", "0.05", "30,000", "5.250", "5.375", "0.625", "not reached", "-", "finished"],
    ]
    assert "baseline: base, named first; equal tokens: 25,000 of C4, which all runs have reached" in said.splitlines()


def test_a_loss_counts_as_reached_where_it_stays():
    """Not where one evaluation is lucky and the next one takes it back."""
    tokens = np.array([0, 10, 20, 30, 40])
    assert reached_at(tokens, np.array([6.0, 3.9, 4.5, 3.5, 3.0]), 4.0) == 25.0
    assert reached_at(tokens, np.array([6.0, 4.0, 4.0, 3.5, 4.0]), 4.0) == 10.0
    assert reached_at(tokens, np.array([6.0, 3.0, 3.0, 3.0, 4.1]), 4.0) is None
    assert reached_at(tokens, np.array([3.0, 3.0, 2.0, 1.0, 1.0]), 4.0) == 0.0
    assert reached_at(np.array([0]), np.array([6.0]), 6.0) == 0.0


def test_a_baseline_that_was_as_good_earlier_is_held_to_it(tmp_path, capsys):
    """It ends at 5, where it was at 5,000 tokens already; the other run is there at 10,000."""
    base = write_run(tmp_path / "base", [(0, 6.0), (100, 4.0), (200, 5.0)])
    other = write_run(tmp_path / "other", [(0, 7.0), (100, 5.0), (200, 3.0)], CHECKPOINT)
    report(base, other, "--output_dir", tmp_path / "out")
    assert [row["reached_at"] for row in written(tmp_path / "out")["settings"]] == [5000.0, 10_000.0]
    assert cells(capsys.readouterr().out)[2][7] == "-5,000 (-100%)"


def test_before_any_text_is_read_nothing_is_saved(tmp_path, capsys):
    base, other = write_run(tmp_path / "base", BASE[:1]), write_run(tmp_path / "other", GOOD, CHECKPOINT)
    report(base, other, "--output_dir", tmp_path / "out")
    assert [row[5:8] for row in cells(capsys.readouterr().out)[1:]] == [
        ["10.000", "0.000", "baseline"],
        ["9.000", "-1.000", "0"],
    ]


def test_runs_that_differ_in_their_seed_alone_are_averaged(tmp_path, capsys):
    """Also if they lie elsewhere and drew other numbers of blocks: the second has 5.5 at 10,000 tokens, 4.5 at 20,000."""
    first = write_run(tmp_path / "a/first", [(0, 9.0), (100, 5.0), (200, 4.0)], questions=[(0.0, 4.0), (0.25, 2.0), (0.5, 1.0)])
    halves = [(0, 10.0), (50, 6.5), (150, 4.5), (250, 4.5)]
    second = write_run(tmp_path / "b/second", halves, questions=[(0.0, 4.0), (0.5, 3.0), (0.5, 2.0), (0.5, 2.0)], seed=1)
    single = write_run(tmp_path / "single", [(0, 9.0), (200, 3.25)], CHECKPOINT)
    other = write_run(tmp_path / "other", [(0, 9.0), (200, 3.25)], CHECKPOINT.replace("12000", "13000"), seed=1)
    report(first, single, second, other, "--output_dir", tmp_path / "out")
    label = "first (mean of 2 seeds)"
    found = written(tmp_path / "out")
    curve = found["curves"][0]
    assert (curve["setting"], curve["c4_tokens"]) == (label, [0, 10_000, 20_000])
    assert curve["c4_loss"] == value([9.5, 5.25, 4.25], pytest.approx([0.5, 0.25, 0.25]))
    assert curve["heldout_acc"] == value([0.0, 0.375, 0.5], pytest.approx([0.0, 0.125, 0.0]))
    assert [row["setting"] for row in found["settings"]] == [label, "single", "other"]
    assert found["settings"][0]["runs"] == ["first", "second"]
    assert found["settings"][1]["difference"] == value(-1.0)
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"{label}: first, second"
    assert cells(said)[1][4:9] == ["4.250 ± 0.250", "4.250 ± 0.250", "0.000", "baseline", "0.500"]


def test_the_errors_of_both_means_enter_their_difference(tmp_path):
    bases = [write_run(tmp_path / f"base{seed}", [(0, 9.0), (100, loss)], seed=seed) for seed, loss in ((0, 4.0), (1, 4.6))]
    others = [
        write_run(tmp_path / f"other{seed}", [(0, 9.0), (100, 3.0 + 0.8 * seed)], CHECKPOINT, seed=seed) for seed in (0, 1)
    ]
    report(*bases, *others, "--output_dir", tmp_path / "out")
    first, second = written(tmp_path / "out")["settings"]
    assert first["difference"] == value(0.0)
    assert second["difference"] == value(pytest.approx(-0.9), pytest.approx(0.5))


def test_one_run_never_counts_as_two(tmp_path):
    runs = [write_run(tmp_path / name, BASE) for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"a, .*b have the same settings and --seed 0, each run once is needed: pass one"):
        report(*runs, "--output_dir", tmp_path / "out")


def test_what_else_differs_is_named(tmp_path):
    housekeeping = {"log_every": 1, "max_wait_sec": 9, "c4_dir": "elsewhere", "wandb_project": "p", "seed": 4}
    runs = [
        write_run(tmp_path / "a", BASE),
        write_run(tmp_path / "b", BASE, CHECKPOINT, 0.02, data_dir="D/look8", mixin_loss="weighted", **housekeeping),
        write_run(tmp_path / "c", BASE, lr=0.002, data_dir="E/look8"),
        write_run(tmp_path / "d", BASE, derived={"total_steps": 200, "pack": "decade"}, data_dir="E/look16"),
    ]
    assert differences(read_pretrainings(runs[:2])) == []
    assert sorted(differences(read_pretrainings(runs))) == [
        "data_dir differs, which the comparison includes: look8 in b, c; look16 in d",
        "lr differs, which the comparison includes: 0.001 in a, b, d; 0.002 in c",
        "pack differs, which the comparison includes: c0ffee in a, b, c; decade in d",
        "total_steps differs, which the comparison includes: 100 in a, b, c; 200 in d",
    ]


@pytest.mark.parametrize("name", ["effective_batch", "seq_len", "num_parameters", "vocab_size", "total_steps", "pack"])
def test_no_run_is_averaged_with_one_of_another_setting(tmp_path, name):
    runs = [write_run(tmp_path / str(number), BASE, derived={name: number}, seed=number) for number in (1, 2)]
    found = read_pretrainings(runs)
    assert len(by_setting(found)) == 2
    assert differences(found) == [f"{name} differs, which the comparison includes: 1 in 1; 2 in 2"]


def test_a_run_that_is_writing_is_reported_as_far_as_it_is(tmp_path, capsys):
    run = write_run(tmp_path / "run", BASE[:3], train=[training(10, 90, 7.0), training(60, 230, 4.9)], finished=False)
    for name in ("eval", "train"):
        with open(run / f"logs/{name}.jsonl", "a") as log:
            log.write('{"step": 75, "c4_lo')
    begun = write_run(tmp_path / "begun", [])
    report(run, begun, "--output_dir", tmp_path / "out")
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"left out: {begun} has no evaluation yet"
    assert [row[0] for row in cells(said)[1:]] == ["run"]
    assert cells(said)[1][3:6] + cells(said)[1][-1:] == ["20,000", "5.000", "5.000", "step 60 of 100"]
    with pytest.raises(ValueError, match=r"begun has no evaluation yet\nno evaluated run, one is needed: wait for"):
        report(begun)


def training(step: int, blocks: int, loss: float | None, accuracy: float | None = None) -> dict:
    return {"step": step, "loss": 1.0, "loss_c4": loss, "synthetic_acc": accuracy, "c4_block_idx": blocks}


def test_the_figure_shows_what_the_logs_say(tmp_path):
    """Answers of 20 records together, since each has few; no difference to the baseline in the first twentieth."""
    train = [training(step, 10 * step, 9.0 if step % 2 else None, step / 32 if step > 5 else None) for step in range(1, 27)]
    base = write_run(tmp_path / "base", [(0, 10.0), (10, 9.0), (200, 5.0), (400, 4.0)])
    good = write_run(tmp_path / "good", GOOD, CHECKPOINT, questions=[(0.5, 2.0)] * 4, train=train)
    loss, right, difference, answers = panels(by_setting(read_pretrainings([base, good])))
    assert [curve.label for curve in loss.curves] == ["base", "good"]
    assert [list(curve.x) for curve in loss.curves] == [[0, 1000, 20_000, 40_000], [0, 10_000, 20_000, 25_000]]
    assert list(loss.curves[0].mean) == [10.0, 9.0, 5.0, 4.0]
    assert loss.y_limits == pytest.approx((3.95, 5.05))  # of 5 at 10,000 tokens to 4 at the end
    assert not loss.training[0][0][0].size
    assert [list(values) for values in loss.training[1][0]] == [list(range(1000, 27_000, 2000)), [9.0] * 13]
    assert [list(values) for values in right.training[1][0]] == [
        pytest.approx([15_500, 16_500]),
        pytest.approx([15.5 / 32, 16.5 / 32]),
    ]
    assert list(right.curves[1].mean) == [0.5] * 4
    assert list(answers.curves[1].mean) == [2.0] * 4
    assert [list(curve.x) for curve in difference.curves] == [[20_000, 40_000], [10_000, 20_000, 25_000]]
    assert list(difference.curves[0].mean) == [0.0, 0.0]
    assert list(difference.curves[1].mean) == pytest.approx([5 - (9 - 4 * 9 / 19), -0.5, -0.75])


def test_one_run_needs_no_other(three_runs, capsys):
    run = three_runs[1]
    report(run)
    assert cells(capsys.readouterr().out)[1][7] == "baseline"
    assert sorted(path.name for path in (run / "report").iterdir()) == ["pretrain.json", "pretrain.jsonl", "pretrain.png"]
    picture = matplotlib.image.imread(run / "report/pretrain.png")[..., :3]
    drawn = np.abs(picture - np.array([31, 119, 180]) / 255).max(axis=-1) < 0.02  # the colour of the first run
    panels_drawn = [half[rows].sum() for half in np.array_split(drawn, 2, axis=1) for rows in (slice(600), slice(600, None))]
    assert min(panels_drawn) > 300
    rows = [json.loads(line) for line in (run / "report/pretrain.jsonl").read_text().splitlines()]
    assert [(row["run"], row["step"], row["c4_tokens"], row["c4_loss"], row["heldout_acc"]) for row in rows] == [
        (str(run), 0, 0, 9.0, 0.875),
        (str(run), 25, 10_000, 5.0, 0.5),
        (str(run), 50, 20_000, 4.5, 0.25),
        (str(run), 75, 25_000, 4.0, 0.375),
    ]


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name / "pretrain", BASE, mixin=mixin) for name, mixin in (("a", 0.0), ("b", 0.02))]
    assert [run.label for run in read_pretrainings(runs)] == [str(run) for run in runs]
    with pytest.raises(ValueError, match=r"2 runs, --output_dir is needed: pass it"):
        report(*runs)


def test_what_is_no_run_of_pretrain_is_named_as_what_it_is(tmp_path):
    with pytest.raises(ValueError, match=r"0 runs, a folder of pretrain.py is needed"):
        report()
    with pytest.raises(
        FileNotFoundError, match=rf"no run in {tmp_path}: pass the folder that pretrain.py wrote, SCRATCH_DIR/pre"
    ):
        report(tmp_path)
    others = [
        ("train.py", {"K": 4}, "pass its runs to report.py ergodic"),
        ("pptrain.py", {"curr_threshold": 0.98}, "pass its runs to report.py curriculum"),
        ("other.py", {}, "pass another folder"),
    ]
    for script, args, advice in others:
        (tmp_path / script).mkdir()
        (tmp_path / script / "run.json").write_text(json.dumps({"script": script, "args": args}))
        with pytest.raises(ValueError, match=rf"{script} is a run of {script}, one of pretrain.py is needed: {advice}"):
            report(tmp_path / script)
    run = write_run(tmp_path / "damaged", BASE)
    path = run / "logs/eval.jsonl"
    path.write_text(path.read_text().replace('"step": 25,', '"step" 25,'))
    with pytest.raises(ValueError, match=r"logs/eval.jsonl line 2 is no record .*: mend or remove that line"):
        report(run)
