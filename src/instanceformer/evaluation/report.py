"""Writes an evaluation to files: numbers, tables and plots."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from instanceformer.evaluation.decomposition import STATES, Decomposition
from instanceformer.evaluation.identity import IdentityMetrics
from instanceformer.evaluation.precision_recall import IOU_THRESHOLDS, NAMES, RECALLS, VideoEvaluation

_MOST_BARS = 80  # still legible in one plot
_STATE_COLORS = (
    ("#009E73", "white"),
    ("#D55E00", "white"),
    ("#E69F00", "black"),
    ("#D9D9D9", "black"),
    ("#56B4E9", "black"),
)
"""Colors of the bars, and of the text on them, for each of ``STATES``."""


def write_report(evaluation: VideoEvaluation, folder: str | Path, names: Mapping[int, str]) -> list[Path]:
    """Write an evaluation to files for programs, spreadsheets and people.

    Args:
        evaluation: the evaluation of a result file.
        folder: folder to write to, created if necessary; existing files with the same names are replaced.
        names: category names by id.

    Returns:
        Paths of the files written: ``metrics.json``, the object that ``instanceformer evaluate --json`` prints;
        ``per_category.csv``, a row for each category that has ground truth; ``precision_recall.csv``, a row for each
        category and IoU threshold with the precision at recalls from 0 to 1; ``precision_recall.png``, the curves
        averaged over the categories, and the AP of each category, or of the lowest if there are many. If identity was
        measured, also ``identity.csv``, what became of the instances, with a row for each occlusion level and age, and
        ``identity.png``, the same as stacked bars.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("metrics.json", "per_category.csv", "precision_recall.csv")]
    files[0].write_text(json.dumps(evaluation.as_json(), indent=1) + "\n")
    rows = {id_: [id_, names.get(id_, "")] for id_ in evaluation.precision}
    _write_table(
        files[1],
        ["category_id", "name", *NAMES],
        ([*row, *evaluation.per_category[id_].values()] for id_, row in rows.items()),
    )
    _write_table(
        files[2],
        ["category_id", "name", "iou_threshold", *(f"{recall:.2f}" for recall in RECALLS)],
        (
            [*row, f"{threshold:.2f}", *(round(float(value), 6) for value in precision)]
            for id_, row in rows.items()
            for threshold, precision in zip(IOU_THRESHOLDS, evaluation.precision[id_], strict=True)
        ),
    )
    files.append(folder / "precision_recall.png")
    plot(evaluation, names).savefig(files[-1], dpi=120)
    if evaluation.identity is not None:
        files += [folder / "identity.csv", folder / "identity.png"]
        groups = evaluation.identity.groups
        _write_table(
            files[-2], ["group", *STATES, "pairs"], ([name, *asdict(group).values()] for name, group in groups.items())
        )
        plot_identity(evaluation.identity).savefig(files[-1], dpi=120)
    return files


def _write_table(path: Path, header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def plot(evaluation: VideoEvaluation, names: Mapping[int, str]) -> Figure:
    """Plot mean precision-recall curves, one per IoU threshold, next to the AP of each category with ground truth.

    The colors, from the cividis map, are suitable for color-blind readers; the legend gives each curve's threshold.
    """
    ids = list(evaluation.precision)
    shown = sorted(ids, key=lambda id_: evaluation.per_category[id_]["AP"])[:_MOST_BARS]
    figure = Figure(figsize=(11, max(4.5, 1 + 0.19 * len(shown))), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    curves.set(xlabel="recall", ylabel="precision", xlim=(0, 1.0), ylim=(0, 1.02))
    curves.set_title(f"AP {evaluation.summary['AP']:.3f}, mean over {len(ids)} categories")
    curves.grid(alpha=0.3)
    if ids:
        mean = np.mean([evaluation.precision[id_] for id_ in ids], axis=0)
        for index, (threshold, precision) in enumerate(zip(IOU_THRESHOLDS, mean, strict=True)):
            color = colormaps["cividis"](0.9 * index / (len(mean) - 1))
            label = f"{threshold:.2f}: {precision.mean():.3f}"
            curves.plot(RECALLS, precision, color=color, linestyle=("-", "--")[index % 2], label=label)
        curves.legend(title="IoU: AP", fontsize=9)
    values = [evaluation.per_category[id_]["AP"] for id_ in shown]
    drawn = bars.barh(range(len(shown)), values, color=(0.0, 0.45, 0.70))
    bars.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
    bars.set_yticks(range(len(shown)), [names.get(id_, str(id_)) for id_ in shown], fontsize=8, parse_math=False)
    bars.set(xlabel="AP", xlim=(0, 1.1), ylim=(-0.6, max(len(shown), 1) - 0.4))
    bars.set_title("AP by category" if len(shown) == len(ids) else f"AP of the {len(shown)} lowest categories")
    return figure


def plot_identity(identity: IdentityMetrics) -> Figure:
    """Plot what became of the instances, by occlusion level and by age of the track, as stacked bars.

    The colors are from the Okabe-Ito palette, which is suitable for color-blind readers.
    """
    occlusion = {"all": identity.overall} | identity.by_occlusion
    ages = {name: group for name, group in identity.by_age.items() if group.pairs}
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(max(len(occlusion), 2), max(len(ages), 2)))
    _stack(left, {name.replace("_", " "): group for name, group in occlusion.items()})
    _stack(right, ages)
    left.set(ylabel="fraction", ylim=(0, 1), title="by occlusion")
    left.set_xlabel("occlusion in the frame; number of instances in frames")
    right.set(xlabel="frames since the instance was found", title="by age of the track")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STATES), frameon=False)
    figure.suptitle(
        f"HOTA {identity.hota:.3f}, DetA {identity.det_a:.3f}, AssA {identity.ass_a:.3f}, IDF1 {identity.idf1:.3f}, "
        f"{identity.idsw} switches; tracks with a score of {identity.hota_score:.2f} or more"
    )
    return figure


def _stack(axes: Axes, groups: Mapping[str, Decomposition]) -> None:
    """Draw a stacked bar for each group; segments that are large enough are labeled with their fraction."""
    ticks = [f"{name}\n{group.pairs:,}" for name, group in groups.items()]
    below = np.zeros(len(groups))
    for state, (color, text) in zip(STATES, _STATE_COLORS, strict=True):
        values = np.array([max(getattr(group, state), 0.0) for group in groups.values()])
        label = state.replace("_", " ")
        bars = axes.bar(range(len(groups)), values, 0.72, bottom=below, color=color, edgecolor="white", label=label)
        labels = [f"{value:.2f}" if value >= 0.05 else "" for value in values]
        axes.bar_label(bars, labels, label_type="center", color=text, fontsize=9)
        below += values
    axes.set_xticks(range(len(groups)), ticks)
    axes.spines[["top", "right"]].set_visible(False)
