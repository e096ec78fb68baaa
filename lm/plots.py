"""Figures of the experiments, as PNG files that are whole or absent."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lm.files import whole_file

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
BAND = "mean ± 1 s.e."


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line with its standard error."""

    label: str
    x: np.ndarray
    """Tokens of context, or trained on."""
    mean: np.ndarray
    se: np.ndarray
    """NaN where it is not known."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """One value for each K with its standard error; each of its fields is as long as `K`."""

    label: str
    K: Sequence[int]
    value: Sequence[float]
    se: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Trail:
    """How a run went through its curriculum."""

    label: str
    stage_step: np.ndarray
    """After which steps a stage began, and the last step."""
    stage: np.ndarray
    """The stage after each of these."""
    step: np.ndarray
    accuracy: np.ndarray
    """Of the latest training examples, at each of `step`."""
    loss: np.ndarray
    threshold: float
    """The accuracy that ends a stage."""
    heldout_step: np.ndarray
    heldout_accuracy: np.ndarray
    heldout_loss: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity of several settings against tokens of text."""

    y_label: str
    curves: Sequence[Curve]
    """Measured on held-out data, one for each setting; NaN where it was not measured."""
    training: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]] = ()
    """For each setting the tokens and values of each of its runs while it trained."""
    y_limits: tuple[float, float] | None = None
    """What is shown; None shows everything."""


@contextmanager
def figure(path: Path, columns: int = 1, width: float = 7.0, rows: int = 1, height: float = 4.2) -> Iterator[list[Axes]]:
    """Yield axes side by side, or below each other over one x axis; on success the figure is saved to `path`."""
    with plt.rc_context(STYLE):
        made, axes = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, sharex="col" if rows > 1 else "none"
        )
        try:
            yield list(axes.flat)
            with whole_file(path) as partial:
                made.savefig(partial, format="png", dpi=160)
        finally:
            plt.close(made)


def draw_curves(axes: Axes, curves: Sequence[Curve], y_label: str, ordered: bool = False) -> None:
    """Curves over tokens of context (log axis), with a band of one standard error; `ordered` colours by rank."""
    for number, curve in enumerate(curves):
        color = _color(number, len(curves), ordered)
        axes.plot(curve.x, curve.mean, label=curve.label, color=color, ls=("-", "--", ":")[number // 10 % 3 * (not ordered)])
        axes.fill_between(curve.x, curve.mean - curve.se, curve.mean + curve.se, color=color, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel(y_label)


def _color(number: int, total: int, ordered: bool):
    return plt.cm.viridis(0.85 * number / max(1, total - 1)) if ordered else plt.cm.tab10(number % 10)


def context_loss_figure(path: Path, curves: Sequence[Curve], title: str, ordered: bool = False) -> None:
    """Loss against context length, a line for each category or K."""
    with figure(path) as (axes,):
        draw_curves(axes, curves, "loss (nats per token)", ordered)
        _legend_beside(axes, title=BAND)
        axes.set_title(title)


def excess_figure(path: Path, curves: Sequence[Curve], area: Points, raw: Points, bound: Points, title: str) -> None:
    """Left the excess loss against context length for each K; right its area against the bounds.

    A raw area far from the bounds would flatten the rest: it is then written at the edge.
    """
    with figure(path, columns=2, width=13) as (left, right):
        draw_curves(left, curves, "excess over K = 1 (nats per token)", ordered=True)
        left.axhline(0, color="black", lw=0.8)
        _legend_beside(left, title=BAND)
        left.set_title(title)
        K = np.linspace(1, max(area.K) + 0.5, 100)
        right.plot(K, np.log(K), color="black", lw=1.2, label="ln K")
        right.plot(bound.K, bound.value, "_", color="black", ms=18, mew=1.6, label=bound.label)
        right.errorbar(area.K, area.value, area.se, fmt="o", color="tab:blue", capsize=3, label=area.label)
        low, high = right.get_ylim()
        low, high = min(low, -0.1 * high), 1.25 * high
        inside = [low < value < high for value in raw.value]
        label = raw.label if all(inside) else f"{raw.label}\n(arrow: off the scale)"
        shown = np.where(inside, raw.value, np.nan)
        right.errorbar(raw.K, shown, raw.se, fmt="o", color="tab:orange", mfc="none", capsize=3, label=label)
        for K_i, value in zip(raw.K, raw.value, strict=True):
            if value >= high:
                right.text(K_i, high, f"{value:.1f}\n↑", color="tab:orange", ha="center", va="top")
            elif value <= low:
                right.text(K_i, low, f"↓\n{value:.1f}", color="tab:orange", ha="center", va="bottom")
        right.set_ylim(low, high)
        _k_axis(right, [1, *area.K])
        right.set_ylabel("excess summed over positions (nats)")
        right.set_title("Area under the excess against its bound")
        _legend_beside(right)


def loss_against_k_figure(path: Path, panels: Sequence[tuple[str, Sequence[Points]]], title: str) -> None:
    """Panels (y label, points), each against K."""
    with figure(path, columns=len(panels), width=5.5 * len(panels)) as all_axes:
        for axes, (y_label, lines) in zip(all_axes, panels, strict=True):
            for number, points in enumerate(lines):
                style = {"fmt": "o-" if number == 0 else "s--", "mfc": None if number == 0 else "none"}
                axes.errorbar(points.K, points.value, points.se, capsize=3, label=points.label, color=f"C{number}", **style)
            _k_axis(axes, sorted({K for points in lines for K in points.K}))
            axes.set_ylabel(y_label)
            if len(lines) > 1:
                axes.legend()
        all_axes[0].figure.suptitle(title)


def accuracy_figure(
    path: Path,
    lookahead: Sequence[int],
    accuracy: Sequence[float],
    interval: Sequence[tuple[float, float]],
    chance: Sequence[float | None],
    num_known: int,
    title: str,
) -> None:
    """Accuracy with its interval, and chance, against lookahead; what follows the first `num_known` is of an unknown one."""
    errors = np.abs(np.array(interval).T - np.array(accuracy))
    known, unknown = slice(num_known), slice(num_known, None)
    with figure(path) as (axes,):
        axes.errorbar(lookahead[known], accuracy[known], errors[:, known], fmt="o-", capsize=3, label="model (95 % interval)")
        axes.plot(lookahead[known], chance[known], "s--", color="tab:gray", mfc="none", label="a random child")
        if len(lookahead) > num_known:
            label = "model, unknown lookahead"
            axes.errorbar(
                lookahead[unknown], accuracy[unknown], errors[:, unknown], fmt="D", capsize=3, color="C1", label=label
            )
        axes.set_ylim(-0.03, 1.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "?" if x in lookahead[unknown] else f"{x:g}"))
        axes.set_xlabel("lookahead (steps)")
        axes.set_ylabel("share of right answers")
        axes.set_title(title)
        _legend_beside(axes)


def curriculum_figure(path: Path, trails: Sequence[Trail]) -> None:
    """Stage, accuracies and losses over the steps of one run or several, a colour each."""
    with figure(path, width=9.0, rows=4, height=9.5) as (stage, window, heldout, loss):
        for number, trail in enumerate(trails):
            color = _color(number, len(trails), ordered=False)
            stage.step(trail.stage_step, trail.stage, where="post", color=color, label=trail.label)
            window.plot(trail.step, trail.accuracy, color=color, lw=1.0)
            window.axhline(trail.threshold, color=color, ls="--", lw=1.0)
            heldout.plot(trail.heldout_step, trail.heldout_accuracy, "o-", color=color, ms=4, lw=1.0)
            loss.plot(trail.step, trail.loss, color=color, lw=1.0)
            loss.plot(trail.heldout_step, trail.heldout_loss, "o", color=color, ms=4)
        if len(trails) > 1:
            stage.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0))
        else:
            stage.set_title(trails[0].label)
        stage.yaxis.set_major_locator(MaxNLocator(integer=True))
        for axes, label in (
            (stage, "stage"),
            (window, "training accuracy"),
            (heldout, "held-out accuracy"),
            (loss, "loss (nats)"),
        ):
            axes.set_ylabel(label)
        _key(window, {"latest examples": "-", "threshold": "--"})
        _key(loss, {"training": "-", "held-out": "o"})
        for axes in (window, heldout):
            axes.set_ylim(-0.04, 1.04)
        if any(len(trail.loss) + len(trail.heldout_loss) for trail in trails):  # a log axis without data is an error
            loss.set_yscale("log")
            loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            loss.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            loss.yaxis.set_minor_locator(NullLocator())
        loss.set_xlabel("optimizer step")
        loss.figure.align_ylabels()


def tokens_figure(path: Path, panels: Sequence[Panel]) -> None:
    """Four panels against tokens of text, the second row below the first, a colour for each setting."""
    with figure(path, columns=2, rows=2, width=12.0, height=7.5) as all_axes:
        for axes, panel in zip(all_axes, panels, strict=True):
            for number, curve in enumerate(panel.curves):
                color = _color(number, len(panel.curves), ordered=False)
                for x, y in panel.training[number] if panel.training else ():
                    axes.plot(x, y, color=color, alpha=0.3, lw=0.8)
                axes.plot(curve.x, curve.mean, "o-", color=color, ms=2.5, lw=1.3, label=curve.label)
                axes.fill_between(curve.x, curve.mean - curve.se, curve.mean + curve.se, color=color, alpha=0.2, lw=0)
            axes.set(ylabel=panel.y_label, ylim=panel.y_limits)
            if not any(np.isfinite(curve.mean).any() for curve in panel.curves):
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
        fig = all_axes[0].figure
        handles, labels = all_axes[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper left", ncols=2, title="dots: held-out data, faint: training data")
        for axes in all_axes[2:]:
            axes.set(xlabel="tokens of C4", xlim=all_axes[0].get_xlim())
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        fig.align_ylabels()


def lr_range_figure(
    path: Path, lrs: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: dict[str, float], title: str
) -> None:
    """Losses against learning rate (log axis), faint, with the smoothed ones, and a labelled line at each of the `marks`.

    What is shown ends a little above the highest loss before the smoothed one was lowest: a divergence would flatten the rest.
    """
    low, before = min(losses), max(losses[: int(np.argmin(smoothed)) + 1])
    height = (before - low) or 1.0
    with figure(path, width=8.0) as (axes,):
        axes.plot(lrs, losses, color="tab:blue", alpha=0.35, lw=1.0, label="loss of each step")
        axes.plot(lrs, smoothed, color="tab:blue", label="smoothed")
        for number, (label, lr) in enumerate(marks.items(), 1):
            axes.axvline(lr, color=f"C{number}", ls=("--", ":", "-.")[number % 3], lw=1.4, label=f"{label}: {lr:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats)", title=title)
        axes.set_ylim(low - 0.05 * height, before + 0.25 * height)
        _legend_beside(axes)


def lr_sweep_figure(path: Path, losses: dict[str, dict[float, Sequence[float]]], title: str) -> None:
    """Loss at the end of each run against its learning rate (log axis): a point for each seed, a line through their means.

    Runs that diverged, of infinite loss, have no point, and the line a gap.
    """
    with figure(path, width=7.5) as (axes,):
        for number, (label, by_lr) in enumerate(losses.items()):
            points = [(lr, loss) for lr, of_seeds in by_lr.items() for loss in of_seeds if np.isfinite(loss)]
            axes.scatter(*zip(*points, strict=True), color=f"C{number}", s=22, alpha=0.5)
            means = [np.mean(of_seeds) for of_seeds in by_lr.values()]
            axes.plot(
                list(by_lr), np.where(np.isfinite(means), means, np.nan), color=f"C{number}", marker="_", ms=12, label=label
            )
        axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss (nats per token)", title=title)
        ticks = sorted({lr for by_lr in losses.values() for lr in by_lr})
        axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.legend(title="points: seeds; line: their mean")


def decisions_figure(path: Path, rows: Sequence[dict], target: str) -> None:
    """Decision accuracy against the share of the target's compute, a panel for each task and a line for each measure.

    Args: rows: of lm.decisions.decision_table; the first measure of a task is shown with its interval.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    columns = min(len(tasks), 4)
    num_rows = -(-len(tasks) // columns)
    with figure(path, columns, width=3.0 * columns + 3.0, rows=num_rows, height=2.7 * num_rows + 1.0) as all_axes:
        for axes, task in zip(all_axes, tasks, strict=False):
            _draw_decisions(axes, [row for row in rows if row["task"] == task], measures)
            axes.set_title(task)
        for axes in all_axes[len(tasks) :]:
            axes.remove()
        for axes in all_axes[max(0, len(tasks) - columns) : len(tasks)]:
            axes.xaxis.set_tick_params(labelbottom=True)  # also where the panel below has been removed
        fig = all_axes[0].figure
        labels = {line.get_label(): line for axes in all_axes[: len(tasks)] for line in axes.get_lines()}
        fig.legend(
            labels.values(), labels.keys(), loc="outside right upper", title="shaded: 95 % interval\nof the first measure"
        )
        fig.supxlabel(f"compute, % of {target}")
        fig.supylabel("decision accuracy")


def _draw_decisions(axes: Axes, rows: Sequence[dict], measures: Sequence[str]) -> None:
    """The lines of one task; each measure has one colour and marker in all panels."""
    for measure in measures:
        mine = [row for row in rows if row["measure"] == measure and row["decision_accuracy"] is not None]
        if not mine:
            continue
        x, y, low, high = (
            np.array([row[key] for row in mine]) for key in ("compute_share", "decision_accuracy", "low", "high")
        )
        number = measures.index(measure)
        color = _color(number, len(measures), ordered=False)
        axes.plot(100 * x, y, marker="osD^vPX*"[number % 8], ms=4, lw=1.3, color=color, label=measure)
        if measure == rows[0]["measure"]:
            axes.fill_between(100 * x, low, high, color=color, alpha=0.15, lw=0)
            axes.vlines(100 * x, low, high, color=color, alpha=0.4, lw=1.0)  # with a single size there is no area
    axes.axhline(0.5, color="black", lw=0.8, ls="--", label="chance")
    axes.set(xscale="log", ylim=(-0.03, 1.03))
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _key(axes: Axes, styles: dict[str, str]) -> None:
    """A legend for kinds of lines, whatever their colour."""
    for label, style in styles.items():
        axes.plot([], [], style, color="black", label=label)
    _legend_beside(axes)


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    """A legend to the right of the axes, where it cannot cover what is drawn."""
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _k_axis(axes: Axes, ks: Sequence[int]) -> None:
    axes.set_xlabel("K (categories trained on)")
    axes.set_xticks(sorted(set(ks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6))
