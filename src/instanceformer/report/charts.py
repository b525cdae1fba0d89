"""Charts as SVG that takes its colors from the page's style, so that they follow its light and dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from instanceformer.evaluation.precision_recall import IOU_THRESHOLDS, RECALLS, VideoEvaluation

INK, LINE = "#010203", "#010204"
"""Stand-ins for colors that the page's style decides: text and axes, grid lines."""
SERIES = tuple(f"#01030{i}" for i in range(6))
"""Stand-ins for the colors of curves."""
VARIABLES = {INK: "currentColor", LINE: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(SERIES, 1)}
DASHES = ("-", "--", ":", "-.")
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "instanceformer",  # the same chart gives the same file
    "font.size": 9,
    "font.family": "sans-serif",
    "text.parse_math": False,  # names of classes are not formulas
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": INK,
    "ytick.color": INK,
}

FACTOR = 30.0
"""Ratio of the highest to the lowest value from which on an axis is logarithmic."""

POINTS = 400
"""Points of a line; more could not be told apart and would take space."""

Points = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Chart:
    """A chart of the page.

    Attributes:
        title: short.
        text: what it shows, for those who cannot see it.
        svg: an element of HTML.
    """

    title: str
    text: str
    svg: str


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an ``svg`` element; ``name`` keeps its ids apart from those of the page's other charts."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)


def line_chart(name: str, title: str, unit: str, curves: Mapping[str, Points], *, x: str = "step") -> Chart:
    """A chart with a line for each name; the vertical axis is logarithmic where values differ by orders of magnitude.

    Args:
        name: of the chart, for ids.
        title: of the chart.
        unit: what the vertical axis shows.
        curves: x and y of the points of each line.
        x: what the horizontal axis shows.
    """
    with style.context(SETTINGS):
        figure = Figure(figsize=(4.6, 2.9), layout="constrained")
        axes = figure.subplots()
        for index, (label, (xs, ys)) in enumerate(curves.items()):
            marker = "o" if len(xs) == 1 else None
            row, column = divmod(index, len(SERIES))  # no two lines have the same color and dashes
            dashes = DASHES[(row + column) % len(DASHES)]
            axes.plot(thin(xs), thin(ys), dashes, marker=marker, color=SERIES[column], label=label, linewidth=1.6)
        every = np.concatenate([ys for _, ys in curves.values()])
        if every.min() > 0 and every.max() > FACTOR * every.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set(xlabel=x, ylabel=unit)
        if len(curves) > 1:
            figure.legend(loc="outside lower center", ncols=3 if len(curves) < 7 or len(curves) > 8 else 4)
        svg = to_svg(figure, name)
    return Chart(title, f"{title}. " + "; ".join(_ends(label, ys, x) for label, (_, ys) in curves.items()), svg)


def thin(values: Sequence[float]) -> list[float]:
    """At most ``POINTS`` values: means of neighbors where there are more."""
    return [float(part.mean()) for part in np.array_split(np.asarray(values), min(POINTS, len(values)))]


def _ends(label: str, values: Sequence[float], x: str) -> str:
    first = "at first" if x == "step" else f"at {x} 0"
    low, high = min(values), max(values)
    return f"{label}: {values[0]:.3g} {first}, {values[-1]:.3g} at the end, between {low:.3g} and {high:.3g}"


def curve_charts(curves: Mapping[str, Mapping[str, tuple[list[int], list[float]]]]) -> list[Chart]:
    """Loss, learning rate, gradient norm and validation AP over the steps of the training; what was not logged lacks.

    Args:
        curves: for each run, the columns of its ``metrics.csv``.
    """

    def chosen(pattern: str) -> dict[str, Points]:
        found = [
            (run if "(" not in pattern else re.sub(pattern, r"\1", column), run, points)
            for run, columns in curves.items()
            for column, points in columns.items()
            if re.fullmatch(pattern, column)
        ]
        several = len(curves) > 1 and "(" in pattern
        return {f"{label}, {run}" if several else label: points for label, run, points in found}

    charts = [("loss", "Loss", "loss", r"train/loss")]
    if len(curves) == 1:
        charts.append(("parts", "Parts of the loss, before weighting", "loss", r"train/(?!loss$|grad|replaced)(.+)"))
    charts += [
        ("rate", "Learning rate", "rate", r"lr-(?:.*/)?(.+)"),
        ("norm", "Gradient norm, before clipping", "norm", r"train/grad\w*_norm"),
        ("validation", "Validation", "AP", r"val/(AP|AP50|AP75)"),
    ]
    return [
        line_chart(f"curve-{name}", title, unit, lines)
        for name, title, unit, pattern in charts
        if (lines := chosen(pattern))
    ]


def precision_recall_chart(evaluations: Mapping[str, VideoEvaluation]) -> Chart:
    """Precision over recall, a mean over the categories, at some IoUs and as a mean over all thresholds."""
    several = len(evaluations) > 1
    lines: dict[str, Points] = {}
    for run, evaluation in evaluations.items():
        if evaluation.precision:
            mean = np.mean([*evaluation.precision.values()], axis=0)
            rows = {f"IoU {IOU_THRESHOLDS[i]:.2f}": mean[i] for i in ((0,) if several else (0, 5))} | {
                "mean over IoUs": mean.mean(axis=0)
            }
            lines |= {
                f"{label}, {run}" if several else label: (RECALLS.tolist(), row.tolist()) for label, row in rows.items()
            }
    return line_chart("precision-recall", "Precision and recall", "precision", lines, x="recall")


def scatter(axes: Axes, points: np.ndarray, color: str, label: str) -> None:
    """Draw (n, 2) points in temporal order: a thin line, dots that grow with time, a label at the last."""
    x, y = points.T
    axes.plot(x, y, color=color, linewidth=0.8, alpha=0.5)
    axes.scatter(x, y, s=np.linspace(8, 34, len(points)), color=color, edgecolors=INK, linewidths=0.4)
    axes.annotate(label, points[-1], xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)


def plane_chart(
    name: str, title: str, vectors: Sequence[np.ndarray], labels: Iterable[str], colors: Iterable[str]
) -> Chart:
    """Vectors of several instances across time, in the two dimensions in which all of them vary most.

    Args:
        name: of the chart, for ids.
        title: of the chart.
        vectors: (n, C) for each instance, in temporal order.
        labels: of the instances.
        colors: of the instances.
    """
    every = np.concatenate(vectors)
    center = every.mean(axis=0)
    _, strengths, directions = np.linalg.svd(every - center, full_matrices=False)
    shares = strengths**2 / max((strengths**2).sum(), 1e-12)
    labels = list(labels)
    with style.context(SETTINGS):
        figure = Figure(figsize=(4.6, 3.6), layout="constrained")
        axes = figure.subplots()
        for rows, label, color in zip(vectors, labels, colors, strict=True):
            scatter(axes, (rows - center) @ directions[:2].T, color, label)
        axes.set(xlabel=f"first component, {shares[0]:.0%}", ylabel=f"second component, {shares[1]:.0%}")
        axes.set(xticks=[], yticks=[])
        svg = to_svg(figure, name)
    count = ", ".join(f"{label} in {len(rows)} frames" for label, rows in zip(labels, vectors, strict=True))
    return Chart(title, f"{title}: {count}", svg)
