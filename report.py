"""Answer an experiment from the folders of its runs: tables, figures, and what was found in one sentence.

    python report.py ergodic runs          # how loss falls with context when K categories are mixed (train.py --K)
    python report.py curriculum S/pptrain  # what each stage of pre-pretraining took, also while the run goes on (pptrain.py)
    python report.py pretrain S/random S/pretrain --output_dir S/report  # what pre-pretraining saved in tokens (pretrain.py)
    python report.py ledger RUN [OTHER]    # was every example trained on exactly once? (any trainer with --ledger)

`ergodic` compares every mixture with the K = 1 runs on its categories, window by window (lm/excess.py says what can be
expected of the difference). `pretrain` compares runs with the first one named at equal tokens of text (lm/token_savings.py
says what is called saved, and when that means little); runs that differ in their seed alone are averaged. `ledger` names
every step and row that is wrong (lm/exactly_once.py), or in which two runs differ first, and then exits with code 1. It draws a
sample of the rows again (lm/redraw.py) if the data that run.json names are there.

Reads   RUN/run.json, RUN/evaluation/CHECKPOINT_SPLIT.json and .npz of every run below the folder (evaluate_model.py context)
        RUN/{run.json, events.jsonl, logs/{train,eval}.jsonl, evaluation/*_search_*.json} of every run named (`curriculum`)
        RUN/{run.json, logs/{train,eval}.jsonl} of every run named (`pretrain`)
        RUN/{run.json, events.jsonl, logs/{ledger,train}.jsonl, checkpoints} (`ledger`)
Writes  report/{context_loss,excess,loss_against_k}.png, report.json and report.md in the folder
        report/{curriculum.png, curriculum.json, curriculum.jsonl} in the run's folder, a line of the latter for each stage
        report/{pretrain.png, pretrain.json, pretrain.jsonl} likewise, a line of the latter for each evaluation
        report/ledger.json in the run's folder
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from lm.commands import run_command
from lm.curriculum import Course, read_course, rows_for_screen, search_lines, stages_passed, where_line, whereabouts
from lm.exactly_once import check_ledger, in_words
from lm.files import whole_file, write_json, write_lines
from lm.ledger import compare_ledgers, comparison_in_words
from lm.lr_sweep import compare as compare_arms
from lm.lr_sweep import in_words as arms_in_words
from lm.lr_sweep import read_arms
from lm.measure import bin_centres, context_bins
from lm.mixtures import Result, analyse, by_K, find_results
from lm.plots import (
    Curve,
    Panel,
    Points,
    Trail,
    context_loss_figure,
    curriculum_figure,
    excess_figure,
    loss_against_k_figure,
    lr_sweep_figure,
    tokens_figure,
)
from lm.pretraining import Pretraining, Setting, by_setting, column, differences, read_pretrainings
from lm.tables import markdown
from lm.token_savings import compare


@dataclass(frozen=True, kw_only=True)
class Ergodic:
    """Loss against context for K mixed categories, and its excess over K = 1."""

    runs_dir: tyro.conf.Positional[Path]
    """Folder with the runs of one experiment, at any depth."""
    checkpoint: str = "final"
    """Which evaluations to take: final, best, step_00000200."""
    split: str = "test"
    """Papers that were measured on."""


@dataclass(frozen=True, kw_only=True)
class Curriculum:
    """What each stage of pre-pretraining took, and where the run is."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of pptrain.py, finished or not."""
    output_dir: Path | None = None
    """Where results go; default RUN/report, needed for several runs."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """What pre-pretraining saved in tokens of text: runs against the first one, at equal tokens."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of pretrain.py, finished or not; the first is the baseline."""
    output_dir: Path | None = None
    """Where results go; default RUN/report, needed for several runs."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Which model ends lower, each at its own best learning rate: runs over models, rates and seeds, alike in all else."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of pretrain.py; the model of the first is what the others are compared with."""
    output_dir: Path | None = None
    """Where results go; needed for several runs."""


@dataclass(frozen=True, kw_only=True)
class OfLedger:
    """Whether a run trained on every example exactly once, and whether another saw the same."""

    run: tyro.conf.Positional[Path]
    """Folder of a run that was started with --ledger, finished or not."""
    other: tyro.conf.Positional[Path | None] = None
    """Another, to be compared step by step."""


def report_folder(args: Curriculum | Pretrain | Sweep, made_by: str) -> Path:
    """Where the results of these runs go."""
    if len(args.runs) != 1 and (not args.runs or args.output_dir is None):
        needed = "--output_dir is needed: pass it" if args.runs else f"a folder of {made_by} is needed: pass one or more"
        raise ValueError(f"{len(args.runs)} runs, {needed}")
    return args.output_dir or args.runs[0] / "report"


def draw(folder: Path, summary: dict[int, dict[str, Any]], num_positions: int) -> list[Path]:
    """The figures: loss against context, excess and its area (if there is one), loss against K."""
    x = bin_centres(context_bins(num_positions))
    paths = [folder / "context_loss.png", folder / "excess.png", folder / "loss_against_k.png"]

    def curves(key: str) -> list[Curve]:
        return [Curve(label=f"K = {K}", x=x, mean=row[key][0], se=row[key][1]) for K, row in summary.items() if key in row]

    def points(key: str, label: str) -> Points:
        having = {K: row[key] for K, row in summary.items() if key in row}
        values, errors = zip(*having.values(), strict=True) if having else ((), ())
        return Points(label=label, K=list(having), value=[float(v) for v in values], se=[float(e) for e in errors])

    context_loss_figure(paths[0], curves("loss_curve"), "Loss against context when K categories are mixed", ordered=True)
    mixed = [points("tail_loss", "models of K categories")]
    if curves("excess_curve"):
        excess_figure(
            paths[1],
            curves("excess_curve"),
            area=points("area_above_tail", "area above the tail"),
            raw=points("area", "whole area"),
            bound=points("bound", "bound for these shares"),
            title="What mixing costs at each context length",
        )
        mixed.append(points("tail_loss_of_one", "models of one category, same text"))
    else:
        paths.pop(1).unlink(missing_ok=True)
    panels = [
        (f"loss at {num_positions // 2 + 1}-{num_positions} tokens of context (nats per token)", mixed),
        ("test perplexity", [points("perplexity", "models of K categories")]),
    ]
    loss_against_k_figure(paths[-1], panels, "Loss with a long context, and perplexity, against K")
    return paths


COLUMNS = {
    "tail_loss": "loss, second half",
    "test_loss": "test loss",
    "perplexity": "perplexity",
    "tail_excess": "excess, second half",
    "area": "area",
    "area_above_tail": "area above tail",
    "bound": "bound",
    "H": "H(p)",
}


def table(summary: dict[int, dict[str, Any]]) -> str:
    """A row for each K, as Markdown."""
    rows = [["K", "runs", *COLUMNS.values(), "ln K"]]
    for K, row in summary.items():
        cells = [_text(*row[key]) if key in row else "-" for key in COLUMNS]
        rows.append([str(K), str(row["num_runs"]), *cells, f"{np.log(K):.3f}"])
    return markdown(rows)


def _text(value: float, se: float) -> str:
    return f"{value:.3f} ± {se:.3f}" if se > 0 else f"{value:.3f}"


def notes(results: list[Result], found: list[dict[str, Any]], left_out: list[str]) -> list[str]:
    """What a reader of the numbers must know."""
    lines = [f"left out: {line}" for line in left_out]
    if max(result.K for result in results) > 1 and not any(result.K == 1 for result in results):
        lines.append("no K = 1 run: the excess is left out; train one for each category (train.py --K 1) and evaluate it")
    for result, row in zip(results, found, strict=True):
        if result.K > 1 and "matched" in row and (missing := sorted(set(result.shares) - set(row["matched"]))):
            lines.append(f"{result.folder}: no K = 1 run on {', '.join(missing)}: excess and bound are over the others")
        elif result.K > 1 and "matched" not in row and any(other.K == 1 for other in results):
            lines.append(f"{result.folder}: no K = 1 run on any of {', '.join(result.shares)}: no excess")
    budgets = {str(result.folder): result.num_tokens for result in results if result.num_tokens}
    if budgets and max(budgets.values()) > 1.01 * min(budgets.values()):
        of = ", ".join(f"{folder} {tokens:,}" for folder, tokens in budgets.items())
        lines.append(f"the models were trained on different numbers of tokens, which the excess includes: {of}")
    return lines


def finding(summary: dict[int, dict[str, Any]], num_positions: int) -> str:
    """One sentence, from the largest K that has an excess."""
    having = [K for K, row in summary.items() if "area" in row]
    if not having:
        return "Finding: no excess to judge, since no mixture has a K = 1 run to be compared with."
    K, row = having[-1], summary[having[-1]]
    value, se = row["area_above_tail"]
    limit = float(row["bound"][0])
    margin = 0.0 if np.isnan(se) else 2 * se
    verdict = "below" if value + margin < limit else "above" if value - margin > limit else "within two errors of"
    first, last = row["excess_curve"][0][0], row["tail_excess"][0]
    return (
        f"Finding: mixing K = {K} categories costs {first:.3f} nats per token at 1 token of context and {last:.3f}"
        f" beyond {num_positions // 2}; what context makes up for sums to {_text(value, se)} nats, {verdict} the"
        f" {limit:.3f} that an ideal predictor could need to learn which category it reads (ln {K} = {np.log(K):.3f})."
    )


def ergodic(args: Ergodic) -> None:
    """Find, analyse, write, and say what was found."""
    results, left_out = find_results(args.runs_dir, args.checkpoint, args.split)
    singles = [result for result in results if result.K == 1]
    found = [analyse(result, singles) for result in results]
    summary = by_K(results, found)
    num_positions = results[0].settings["evaluation sequence_length"]
    folder = args.runs_dir / "report"
    paths = draw(folder, summary, num_positions)
    remarks, sentence = notes(results, found, left_out), finding(summary, num_positions)
    about = [{"run": str(r.folder), "K": r.K, "seed": r.seed, "shares": r.shares, "num_tokens": r.num_tokens} for r in results]
    record = {
        "settings": results[0].settings,
        "context": bin_centres(context_bins(num_positions)).tolist(),
        "K": {str(K): _plain(row) for K, row in summary.items()},
        "runs": [head | _plain(row) for head, row in zip(about, found, strict=True)],
        "notes": remarks,
        "finding": sentence,
    }
    write_json(folder / "report.json", record)
    text = "\n\n".join([*remarks, table(summary)])
    with whole_file(folder / "report.md") as partial:
        pictures = "\n\n".join(f"![{path.stem}]({path.name})" for path in paths)
        partial.write_text(f"# Mixing K categories\n\n{sentence}\n\n{text}\n\n{pictures}\n", encoding="utf-8")
    print(f"{text}\n\nfigures: {', '.join(map(str, paths))}\n{sentence}")


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """Pairs as {"value", "se"} for JSON, with null for an error that is not known."""

    def known(x: Any) -> Any:
        return [known(y) for y in x] if np.ndim(x) else None if np.isnan(x) else float(x)

    return {
        key: {"value": known(pair[0]), "se": known(pair[1])} if isinstance(pair, tuple) else pair for key, pair in found.items()
    }


def curriculum(args: Curriculum) -> None:
    """Read, draw, write, and say where each run is."""
    folder = report_folder(args, "pptrain.py")
    courses = [read_course(run) for run in args.runs]
    stages = [{"run": str(course.folder), **row} for course in courses for row in stages_passed(course)]
    curriculum_figure(folder / "curriculum.png", [trail(course) for course in courses])
    write_lines(folder / "curriculum.jsonl", stages)
    about = [{"run": str(course.folder), **whereabouts(course), "searches": course.searches} for course in courses]
    write_json(folder / "curriculum.json", {"runs": about, "stages": stages})
    for course in courses:
        print("\n".join([str(course.folder), markdown(rows_for_screen(course)), *search_lines(course), ""]))
    print(f"figure: {folder / 'curriculum.png'}, results: {folder / 'curriculum.json'}, {folder / 'curriculum.jsonl'}")
    print("\n".join(where_line(course) for course in courses))


def trail(course: Course) -> Trail:
    """What the figure shows of a run."""

    def values(records: list[dict[str, Any]], key: str) -> np.ndarray:
        return np.array([record[key] for record in records], dtype=float)  # null becomes NaN

    args, now, passed = course.run["args"], whereabouts(course), course.passed
    begun = [args["start_stage"], *(record["stage"] + args["stage_step"] for record in passed)]
    return Trail(
        label=str(course.folder),
        stage_step=np.array([0, *(record["step"] for record in passed), now["step"]]),
        stage=np.minimum([*begun, now["stage"]], now["stages"]),
        step=values(course.train, "step"),
        accuracy=values(course.train, "curr_acc"),
        loss=values(course.train, "loss"),
        threshold=args["curr_threshold"],
        heldout_step=values(course.held_out, "step"),
        heldout_accuracy=values(course.held_out, "heldout_acc"),
        heldout_loss=values(course.held_out, "heldout_loss"),
    )


STEEP = 0.05  # of the tokens; in the first of them the loss falls from ln(vocabulary) to near where it ends


def rows_of_savings(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What `compare` found as cells of a table, its head first."""
    head = ["runs", "begun from", "mixin", "C4 tokens", "C4 loss", "at equal tokens", "difference", "tokens saved"]
    cells = [[*head, "right answers", "state"]]
    for row in rows:
        begun = "/".join(Path(row["pptrain_checkpoint"]).parts[-3:]) if row["pptrain_checkpoint"] else "random weights"
        losses = [_text(*row[key]) for key in ("c4_loss", "c4_loss_at_equal_tokens", "difference")]
        answers = "-" if np.isnan(row["heldout_acc"][0]) else _text(*row["heldout_acc"])
        state = "finished" if row["finished"] else f"step {row['step']:,} of {row['total_steps']:,}"
        first = [row["setting"], begun, f"{row['mixin_percent']:g}", f"{row['c4_tokens']:,}"]
        cells.append([*first, *losses, _saved(row, rows[0]), answers, state])
    return cells


def _saved(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    if row is baseline:
        return "baseline"
    if row["tokens_saved"] is None:
        return "not reached"
    share = f" ({row['tokens_saved'] / baseline['reached_at']:.0%})" if baseline["reached_at"] else ""
    return f"{row['tokens_saved']:,.0f}{share}"


def held_out_curves(setting: Setting) -> dict[str, Any]:
    """Everything that was measured on held-out data, against tokens of C4, for JSON."""
    keys = ("c4_loss", "heldout_acc", "heldout_loss")
    curves = {key: setting.curve(key, setting.last_tokens) for key in keys}
    return {"c4_tokens": curves["c4_loss"][0].tolist()} | _plain({key: curve[1:] for key, curve in curves.items()})


def panels(settings: Sequence[Setting]) -> list[Panel]:
    """Loss on text and right answers; below them the difference to the baseline and the loss on answers.

    A run's loss on synthetic rows while it trains is over the questions too, so it is not drawn beside that on answers.
    """

    def curves(key: str) -> list[Curve]:
        found = [setting.curve(key, setting.last_tokens) for setting in settings]
        return [Curve(label=of.label, x=x, mean=mean, se=se) for of, (x, mean, se) in zip(settings, found, strict=True)]

    def training(key: str, window: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        return [[trained(run, key, window) for run in setting.runs] for setting in settings]

    loss, versus = curves("c4_loss"), [against(settings[0], setting) for setting in settings]
    right = {"y_label": "share of right answers", "y_limits": (-0.04, 1.04)}
    return [
        Panel(y_label="loss on C4 (nats per token)", curves=loss, training=training("loss_c4", 1), y_limits=late(loss)),
        Panel(**right, curves=curves("heldout_acc"), training=training("synthetic_acc", 20)),  # few a record: smoothed
        Panel(y_label="loss on C4, less the baseline's", curves=versus),
        Panel(y_label="loss on answers (nats per token)", curves=curves("heldout_loss")),
    ]


def late(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """Limits that hold the curves but for the first twentieth, which is so steep that nothing else would be seen."""
    since = STEEP * max(curve.x[-1] for curve in curves)
    values = np.concatenate([curve.mean[curve.x >= since] for curve in curves])
    margin = 0.05 * np.ptp(values)
    return (values.min() - margin, values.max() + margin) if margin > 0 else None


def trained(run: Pretraining, key: str, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of C4 and a training measure, both averaged over `window` records that have it."""
    records = [record for record in run.train if record[key] is not None]
    if len(records) < window:
        return np.empty(0), np.empty(0)
    weights = np.full(window, 1 / window)
    return tuple(np.convolve(values, weights, "valid") for values in (run.tokens(records), column(records, key)))


def against(baseline: Setting, setting: Setting) -> Curve:
    """The held-out loss on text less the baseline's, as far as both have come, without the steep beginning.

    There, a line between two evaluations of the baseline is far above its curve.
    """
    until = min(baseline.last_tokens, setting.last_tokens)
    x, mean, se = setting.curve("c4_loss", until)
    tokens, other, other_se = baseline.curve("c4_loss", until)
    difference = mean - np.interp(x, tokens, other)
    error = se if setting is baseline else np.hypot(se, np.interp(x, tokens, other_se))
    shown = x >= STEEP * until
    return Curve(label=setting.label, x=x[shown], mean=difference[shown], se=error[shown])


def pretrain(args: Pretrain) -> None:
    """Read, compare, draw, write, and say what was saved."""
    folder = report_folder(args, "pretrain.py")
    runs = read_pretrainings(args.runs)
    begun = [run for run in runs if run.held_out]
    remarks = [f"left out: {run.folder} has no evaluation yet" for run in runs if not run.held_out]
    if not begun:
        raise ValueError(
            "\n".join([*remarks, "no evaluated run, one is needed: wait for the evaluation before its first step"])
        )
    settings = by_setting(begun)
    remarks += [f"{of.label}: {', '.join(run.label for run in of.runs)}" for of in settings if len(of.runs) > 1]
    remarks += differences(begun)
    equal, rows = compare(settings)
    tokens_figure(folder / "pretrain.png", panels(settings))
    plain = [_plain(row) for row in rows]
    curves = [{"setting": setting.label, **held_out_curves(setting)} for setting in settings]
    write_json(folder / "pretrain.json", {"equal_tokens": equal, "settings": plain, "curves": curves, "notes": remarks})
    write_lines(
        folder / "pretrain.jsonl",
        [
            {"run": str(run.folder), "c4_tokens": int(tokens), **record}
            for run in begun
            for tokens, record in zip(run.tokens(run.held_out), run.held_out, strict=True)
        ],
    )
    print("\n".join([*remarks, markdown(rows_of_savings(rows))]))
    print(f"baseline: {rows[0]['setting']}, named first; equal tokens: {equal:,} of C4, which all runs have reached")
    print(f"figure: {folder / 'pretrain.png'}, results: {folder / 'pretrain.json'}, {folder / 'pretrain.jsonl'}")


def sweep(args: Sweep) -> None:
    """Read, compare, draw, write, and say which model was lower."""
    folder = report_folder(args, "pretrain.py")
    runs = read_pretrainings(args.runs)
    arms = read_arms(runs)
    rows = compare_arms(arms)
    losses = {arm.model: {lr: list(cell.values()) for lr, cell in arm.losses.items()} for arm in arms}
    tokens = runs[0].last_step * runs[0].run["derived"]["tokens_per_step"]
    lr_sweep_figure(folder / "sweep.png", losses, f"After {tokens:,} tokens")
    each = [
        {"model": arm.model, "lr": lr, "seed": seed, "loss": loss if math.isfinite(loss) else None}
        for arm in arms
        for lr, cell in arm.losses.items()
        for seed, loss in cell.items()
    ]
    write_lines(folder / "sweep.jsonl", each)
    said = arms_in_words(arms, rows)
    write_json(folder / "sweep.json", {"tokens": tokens, "models": [_plain(row) for row in rows], "found": said})
    lrs = sorted({lr for arm in arms for lr in arm.losses})
    table = [["model", "parameters", *[f"lr {lr:g}" for lr in lrs]]]
    for arm in arms:
        means = [arm.mean(lr) for lr in lrs]
        cells = [_text(*mean) if math.isfinite(mean[0]) else "diverged" for mean in means]
        table.append([arm.model, f"{arm.parameters:,}", *cells])
    print("\n".join([markdown(table), *said]))
    print(f"figure: {folder / 'sweep.png'}, results: {folder / 'sweep.json'}, {folder / 'sweep.jsonl'}")


def ledger(args: OfLedger) -> int:
    """Check, compare, write, and say what was found; returns 1 unless all is as it should be."""
    found = check_ledger(args.run)
    print("\n".join(in_words(found)))
    if args.other:
        found["comparison"] = compare_ledgers(args.run, args.other)
        print(comparison_in_words(str(args.run), found["comparison"]))
    write_json(args.run / "report/ledger.json", found)
    compared = found.get("comparison", {"same_steps": 1, "first_difference": None})
    return 0 if found["exactly_once"] and compared["same_steps"] and not compared["first_difference"] else 1


def main(argv: list[str] | None = None) -> int:
    """Answer the question that the first argument names; returns the exit code."""
    commands = {"ergodic": (Ergodic, ergodic), "curriculum": (Curriculum, curriculum), "pretrain": (Pretrain, pretrain)}
    commands["sweep"] = (Sweep, sweep)
    return run_command(commands | {"ledger": (OfLedger, ledger)}, argv)


if __name__ == "__main__":
    sys.exit(main())
