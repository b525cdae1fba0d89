"""A picture of a comparison: a line for one parameter, a heat map for two, otherwise dots with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from instanceformer.studies.compare import Comparison, Row, show_mean

BLUE, GREY = "#0072B2", "#767676"


def plot(comparison: Comparison) -> Figure:
    """Plot the first metric of a comparison."""
    rows, name = comparison.rows, comparison.metrics[0]
    varied = varied_options(rows)
    across, along = [*varied.items(), ("", []), ("", [])][:2]
    is_map = len(varied) == 2 and len(across[1]) * len(along[1]) <= 3 * len(rows)  # few cells are empty
    height = 4.0 if len(varied) == 1 else 1.4 + 0.6 * len(across[1]) if is_map else 1.6 + 0.45 * len(rows)
    figure = Figure(figsize=(7.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(f"{name} on {comparison.videos} test videos", fontsize=11)
    if len(varied) == 1:
        _draw_line(axes, rows, name, across)
    elif is_map:
        _draw_map(axes, rows, name, across, along)
    else:
        _draw_dots(axes, rows, name)
    return figure


def varied_options(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The options in which the settings differ, each with its values; empty unless every setting has all of them."""
    first = rows[0].group.options
    if any(row.group.options.keys() != first.keys() for row in rows):
        return {}
    values = {option: [row.group.options[option] for row in rows] for option in first}
    different = {option: [v for i, v in enumerate(found) if v not in found[:i]] for option, found in values.items()}
    return {
        option: sorted(found) if all(isinstance(value, int | float) for value in found) else found
        for option, found in different.items()
        if len(found) > 1
    }


def _draw_line(axes: Axes, rows: Sequence[Row], name: str, parameter: tuple[str, list[Any]]) -> None:
    """The mean against the parameter, its deviation as a band, each seed as a dot."""
    option, values = parameter
    by_value = {values.index(row.group.options[option]): row.metrics[name] for row in rows}
    places = sorted(by_value)
    means = np.array([by_value[place].mean for place in places])
    around = np.array([by_value[place].deviation or 0.0 for place in places])
    axes.fill_between(places, means - around, means + around, color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(places, means, "o-", color=BLUE, label="mean ± standard deviation")
    for place in places:
        seeds = [*by_value[place].values.values()]
        axes.plot([place] * len(seeds), seeds, ".", color=GREY, label="one seed" if place == places[0] else None)
    axes.set_xticks(places, [str(values[place]) for place in places])
    axes.set(xlabel=_leaf(option), ylabel=name)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def _draw_map(
    axes: Axes, rows: Sequence[Row], name: str, across: tuple[str, list[Any]], along: tuple[str, list[Any]]
) -> None:
    """The mean for every pair of values, with its deviation as text; pairs without a run stay empty."""
    means = np.full((len(across[1]), len(along[1])), np.nan)
    text = {}
    for row in rows:
        cell = across[1].index(row.group.options[across[0]]), along[1].index(row.group.options[along[0]])
        means[cell], text[cell] = row.metrics[name].mean, show_mean(name, row.metrics[name])
    image = axes.imshow(means, cmap="cividis", aspect="auto")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (y, x), shown in text.items():
        axes.text(x, y, shown, ha="center", va="center", color="black" if means[y, x] > middle else "white", fontsize=9)
    axes.set_yticks(range(len(across[1])), [str(value) for value in across[1]])
    axes.set_xticks(range(len(along[1])), [str(value) for value in along[1]])
    axes.set(ylabel=_leaf(across[0]), xlabel=_leaf(along[0]))
    assert axes.figure is not None
    axes.figure.colorbar(image, label=name)


def _draw_dots(axes: Axes, rows: Sequence[Row], name: str) -> None:
    """A mean for each setting with its interval over videos, and each seed as a small dot."""
    for place, row in enumerate(rows):
        measured = row.metrics[name]
        seeds = [*measured.values.values()]
        if measured.interval is not None:
            label = "95 % over videos" if place == 0 else None
            axes.plot(measured.interval, [place] * 2, color=BLUE, alpha=0.35, linewidth=5, label=label)
        axes.plot(seeds, [place] * len(seeds), ".", color=GREY, label="one seed" if place == 0 else None)
        axes.plot([measured.mean], [place], "o", color=BLUE, label="mean over seeds" if place == 0 else None)
    axes.set_yticks(range(len(rows)), [row.group.name for row in rows], parse_math=False)
    axes.set(xlabel=name, ylim=(len(rows) - 0.5, -0.5))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="best")


def _leaf(option: str) -> str:
    return option.rpartition(".")[2]
