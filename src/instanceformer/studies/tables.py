"""A comparison as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from instanceformer.studies.compare import Comparison, Interval, Measured, show_mean, show_number


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``table.json`` and ``plot.png`` to a folder; returns their paths."""
    from instanceformer.studies.plots import plot  # here, since importing Matplotlib takes a second

    files = [folder / name for name in ("table.md", "table.csv", "table.json", "plot.png")]
    files[0].write_text(as_markdown(comparison))
    _write_csv(comparison, files[1])
    files[2].write_text(json.dumps(as_json(comparison), indent=1) + "\n")
    plot(comparison).savefig(files[3], dpi=120)
    return files


def as_markdown(comparison: Comparison) -> str:
    """Two tables, of means and of differences from the baseline, and what their numbers are."""
    names, rows = comparison.metrics, comparison.rows
    means = [
        [row.group.name, str(len(row.group.runs)), *(show_mean(name, row.metrics[name]) for name in names)]
        for row in rows
    ]
    lines = [*_table(["setting", "seeds", *names], means), ""]
    lines.append(f"Mean ± standard deviation over seeds, on {comparison.videos} test videos.")
    others = [row for row in rows if row.group.name != comparison.baseline]
    if others:
        differences = [
            [row.group.name, *(_show_difference(name, row.metrics[name]) for name in names)] for row in others
        ]
        lines += ["", *_table([f"minus {comparison.baseline}", *names], differences), ""]
        lines.append(
            f"Differences of means [95 % interval] ± standard deviation over paired seeds. For the interval the videos "
            f"are drawn anew {comparison.resamples} times, with replacement and the same for both settings; each time "
            "both are measured on them with all their seeds, and averaged. Seeds are not drawn: whether another seed "
            "gives the same is what the deviation says."
        )
    lines += ["", *(f"- {note}" for note in comparison.notes)] if comparison.notes else []
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison) -> dict[str, Any]:
    """All numbers, unrounded."""
    return {
        "baseline": comparison.baseline,
        "metrics": comparison.metrics,
        "videos": comparison.videos,
        "resamples": comparison.resamples,
        "notes": comparison.notes,
        "settings": [
            {
                "name": row.group.name,
                "options": row.group.options,
                "runs": {str(seed): str(run.folder) for seed, run in row.group.runs.items()},
                "metrics": {
                    name: {"mean": measured.mean, "deviation": measured.deviation, **vars(measured)}
                    for name, measured in row.metrics.items()
                },
            }
            for row in comparison.rows
        ],
    }


def _write_csv(comparison: Comparison, path: Path) -> None:
    """A row for each setting and metric; fields that do not apply are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = ["setting", "metric", "seeds", "mean", "deviation", "low", "high"]
        writer.writerow([*columns, *(f"difference{end}" for end in ("", "_low", "_high", "_deviation"))])
        for row in comparison.rows:
            for name, found in row.metrics.items():
                own, of_difference = found.interval or (None, None), found.difference_interval or (None, None)
                start = [row.group.name, name, len(found.values), found.mean, found.deviation, *own]
                writer.writerow([*start, found.difference, *of_difference, found.difference_deviation])


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table whose columns line up."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]


def _show_difference(name: str, measured: Measured) -> str:
    assert measured.difference is not None
    around = "" if measured.difference_deviation is None else f" ± {show_number(name, measured.difference_deviation)}"
    return f"{show_number(name, measured.difference, '+')}{_show_interval(name, measured.difference_interval)}{around}"


def _show_interval(name: str, interval: Interval | None) -> str:
    return (
        "" if interval is None else f" [{show_number(name, interval[0], '+')}, {show_number(name, interval[1], '+')}]"
    )
