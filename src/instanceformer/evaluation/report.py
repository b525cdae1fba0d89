"""An evaluation as files: numbers, tables and precision-recall curves."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from instanceformer.evaluation.matching import IOU_THRESHOLDS, RECALLS
from instanceformer.evaluation.summary import NAMES, VideoEvaluation

_MOST_BARS = 80  # that are legible in one picture


def write_report(evaluation: VideoEvaluation, folder: str | Path, names: Mapping[int, str]) -> list[Path]:
    """Write what an evaluation found, for programs, spreadsheets and people.

    Args:
        evaluation: of a result file.
        folder: is made if it does not exist; files of the same names are replaced.
        names: of the categories, by id.

    Returns:
        The files: ``metrics.json``, the object that ``instanceformer evaluate --json`` prints; ``per_category.csv``, a
        row for each category that has ground truth; ``precision_recall.csv``, a row for each category and IoU
        threshold, with the precision at recalls of 0 to 1; ``precision_recall.png``, the curves' means over the
        categories, and AP by category, of the lowest where there are many.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("metrics.json", "per_category.csv", "precision_recall.csv")]
    content = {**evaluation.summary, **evaluation.extras, "per_category": evaluation.per_category}
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    rows = {id_: [id_, names.get(id_, "")] for id_ in evaluation.precision}
    with files[1].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category_id", "name", *NAMES])
        writer.writerows([*row, *evaluation.per_category[id_].values()] for id_, row in rows.items())
    with files[2].open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["category_id", "name", "iou_threshold", *(f"{recall:.2f}" for recall in RECALLS)])
        for id_, row in rows.items():
            for threshold, precision in zip(IOU_THRESHOLDS, evaluation.precision[id_], strict=True):
                writer.writerow([*row, f"{threshold:.2f}", *(round(float(value), 6) for value in precision)])
    files.append(folder / "precision_recall.png")
    plot(evaluation, names).savefig(files[-1], dpi=120)
    return files


def plot(evaluation: VideoEvaluation, names: Mapping[int, str]) -> Figure:
    """Mean precision-recall curves, one for each IoU threshold, beside the AP of the categories that have ground truth.

    The colours, of the map cividis, are as well told apart by the colour-blind; each curve also bears its threshold.
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
            colour = colormaps["cividis"](0.9 * index / (len(mean) - 1))
            label = f"{threshold:.2f}: {precision.mean():.3f}"
            curves.plot(RECALLS, precision, color=colour, linestyle=("-", "--")[index % 2], label=label)
        curves.legend(title="IoU: AP", fontsize=9)
    values = [evaluation.per_category[id_]["AP"] for id_ in shown]
    places = bars.barh(range(len(shown)), values, color=(0.0, 0.45, 0.70))
    bars.bar_label(places, fmt="%.2f", padding=2, fontsize=8)
    bars.set_yticks(range(len(shown)), [names.get(id_, str(id_)) for id_ in shown], fontsize=8)
    bars.set(xlabel="AP", xlim=(0, 1.1), ylim=(-0.6, max(len(shown), 1) - 0.4))
    bars.set_title("AP by category" if len(shown) == len(ids) else f"AP of the {len(shown)} lowest categories")
    return figure
