"""The numbers of the report and what they mean, and the tables that break them down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from instanceformer.evaluation.decomposition import STATES
from instanceformer.evaluation.precision_recall import VideoEvaluation

GROUPS: dict[str, dict[str, str]] = {
    "Detection, segmentation and tracking together": {
        "AP": "Average precision: how many tracks are right when they are taken in the order of their scores, averaged "
        "over recall, over ten thresholds of overlap from 0.50 to 0.95, and over the classes. The challenge's number.",
        "AP50": "The same where an overlap (IoU over all frames) of 0.50 is enough: found and followed, masks aside.",
        "AP75": "The same at an overlap of 0.75: masks have to be good as well.",
        "AP_best_quarter": "AP if a track is scored by the best quarter of its frames instead of the mean.",
        "AP_mean": "AP if a track is scored by the mean over its frames instead of the best quarter.",
        "AR1": "Average recall: the fraction of instances found with one track for each video and class.",
        "AR10": "The same with ten tracks for each video and class.",
        "AR100": "The same with a hundred: what no better ranking could exceed.",
    },
    "Identity": {
        "HOTA": "Higher-order tracking accuracy: the geometric mean of DetA and AssA, over thresholds of overlap.",
        "DetA": "Detection accuracy: how well masks in single frames agree with the truth, whoever they belong to.",
        "AssA": "Association accuracy: how well the frames of an instance stay together in one track.",
        "IDF1": "The F1 score of frames whose identity is right, under the best pairing of tracks and instances.",
        "IDSW": "How often an instance changes from one track to another; fewer is better.",
        "HOTA_score": "The lowest score of a track that counts in this section and in the videos, for the best HOTA.",
    },
    "AP if one part were perfect": {
        "AP_identity": "If every mask were given to the instance that it covers: what better linking could gain.",
        "AP_classes": "If every track had the class of the instance that it overlaps most.",
        "AP_masks": "If every mask that covers an instance were that instance's mask.",
        "AP_all": "All three together. The rest is due to what no mask covers, to false tracks and to their ranking.",
    },
}
"""The numbers by section, with what they mean."""

MEANINGS = {
    "right": "its track covers it and has its class",
    "captured": "its track covers another instance instead",
    "lost": "its track covers no instance, or has no mask",
    "not_found": "no track has found it so far",
    "wrong_class": "its track covers it but has another class",
    "hidden": "it is not visible, which counts as nothing",
}
"""What the states of an instance in a frame mean."""

SIZES = {"APs": "small, to 128 x 128 pixels", "APm": "medium, to 256 x 256", "APl": "large"}
OCCLUSION = {"APso": "slight", "APmo": "moderate", "APho": "heavy"}


@dataclass(frozen=True)
class Row:
    """A line of a table: a name, a value for each run, and what it means. Values that are undefined are None."""

    name: str
    values: list[float | None]
    meaning: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a title."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Shares:
    """What became of a group of instances: the fraction in each of ``STATES``, and the number of pairs."""

    group: str
    fractions: dict[str, float]
    pairs: int


def _defined(value: float | None) -> float | None:
    return None if value is None or value < 0 else value


def number_tables(evaluations: Mapping[str, VideoEvaluation], logged: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """The sections of ``GROUPS`` with the numbers of every run, without those that no run has.

    Args:
        evaluations: of each run.
        logged: the numbers that each run's ``test`` logged, such as ``test/AP_best_quarter``.
    """
    by_run = []
    for run, evaluation in evaluations.items():
        assert evaluation.identity is not None
        of_test = {name.removeprefix("test/"): value for name, value in logged[run].items()}
        by_run.append(of_test | evaluation.summary | evaluation.identity.numbers)
    tables = []
    for title, meanings in GROUPS.items():
        rows = [Row(name, [_defined(numbers.get(name)) for numbers in by_run], text) for name, text in meanings.items()]
        tables.append(Table(title, [row for row in rows if any(value is not None for value in row.values)]))
    return tables


def breakdowns(evaluations: Mapping[str, VideoEvaluation], names: Mapping[int, str]) -> list[Table]:
    """AP by class, by size and by occlusion; groups without any instance are left out."""
    every = [*evaluations.values()]
    tables = [
        Table("AP by class", [Row(names[id_], [_defined(e.per_category[id_]["AP"]) for e in every]) for id_ in names]),
        Table("AP by size", [Row(text, [_defined(e.summary[key]) for e in every]) for key, text in SIZES.items()]),
        Table(
            "AP by occlusion",
            [Row(text, [_defined(e.extras.get(key)) for e in every]) for key, text in OCCLUSION.items()],
        ),
    ]
    kept = [Table(t.title, [row for row in t.rows if any(v is not None for v in row.values)]) for t in tables]
    return [table for table in kept if table.rows]


def shares(evaluation: VideoEvaluation) -> list[Shares]:
    """What became of all instances, of those in each level of occlusion, and of those of each age of their track."""
    assert evaluation.identity is not None
    return [
        Shares(_group_name(name), {state: getattr(group, state) for state in STATES}, group.pairs)
        for name, group in evaluation.identity.groups.items()
        if group.pairs
    ]


def _group_name(name: str) -> str:
    age = name.removeprefix("age ")
    return f"found {age} frames ago" if age != name else name.replace("_", " ")
