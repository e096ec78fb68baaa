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
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

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
    """Tokens of context."""
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


@contextmanager
def figure(path: Path, columns: int = 1, width: float = 7.0) -> Iterator[list[Axes]]:
    """Yield axes side by side; on success the figure is saved to `path`."""
    with plt.rc_context(STYLE):
        made, axes = plt.subplots(1, columns, figsize=(width, 4.2), layout="constrained", squeeze=False)
        try:
            yield list(axes[0])
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


def _legend_beside(axes: Axes, title: str | None = None) -> None:
    """A legend to the right of the axes, where it cannot cover what is drawn."""
    axes.legend(title=title, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _k_axis(axes: Axes, ks: Sequence[int]) -> None:
    axes.set_xlabel("K (categories trained on)")
    axes.set_xticks(sorted(set(ks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(6))
