"""Gathers what runs leave and renders it as one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from instanceformer import __version__
from instanceformer.data.annotations import Video, VideoDataset
from instanceformer.data.formats.youtube_vis import read_annotations
from instanceformer.evaluation.decomposition import STATES
from instanceformer.evaluation.evaluate import evaluate_files
from instanceformer.evaluation.precision_recall import VideoEvaluation
from instanceformer.evaluation.results import Track, iterate_results
from instanceformer.files import check_writable, replacing
from instanceformer.inference.render import select_video
from instanceformer.report.charts import curve_charts, precision_recall_chart
from instanceformer.report.figures import choose_video, make_figures
from instanceformer.report.numbers import MEANINGS, breakdowns, number_tables, shares
from instanceformer.report.videos import Film, Followed, make_film, video_name
from instanceformer.studies.compare import check_comparable
from instanceformer.studies.run import Run, check_annotations, read_run

BUDGET = 12 * 2**20
"""Bytes that the videos take in the page, unless the first alone takes more."""


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Attributes:
        videos: at most how many videos, the worst first.
        figures: id of the video in the paper's figures; by default the one in which most instances are occluded.

    Raises:
        ValueError: ``videos`` is below 1.
    """

    videos: int = 12
    figures: int | None = None

    def __post_init__(self) -> None:
        if self.videos < 1:
            raise ValueError(f"videos: found {self.videos}, expected at least 1")


@dataclass(frozen=True)
class Line:
    """A video in the list: its name, what became of its instances in each run, and whether the page can play it."""

    name: str
    frames: int
    instances: int
    shares: list[dict[str, float]]


def write_report(folders: Sequence[Path], output: Path, options: ReportOptions = ReportOptions()) -> int:
    """Write the report of one run, or of two on the same videos side by side.

    Args:
        folders: of one or two finished runs.
        output: the page, an HTML file.
        options: what it shows.

    Returns:
        The number of videos in it.

    Raises:
        OSError: a file is missing, or the page cannot be written.
        ValueError: the runs were tested on different videos or under different protocols, or the annotations are not
            the ones that they were tested on.
    """
    if len(folders) > 2:
        raise ValueError(f"found {len(folders)} runs, expected one or two; `instanceformer compare` takes any number")
    if output.is_dir() or not output.absolute().parent.is_dir():
        found = "a folder" if output.is_dir() else f"no folder {output.parent}"
        raise ValueError(f"{output}: found {found}, expected the name of a file in a folder that exists")
    check_writable(output)
    runs = dict(zip(_names(folders), map(read_run, folders), strict=True))
    first, *others = runs.values()
    check_comparable([first, *others])
    check_annotations(first)
    if not first.images.is_dir():
        raise FileNotFoundError(
            f"{first.images}: found no such folder, expected the frames that {first.folder} was tested on; start where "
            "that test was started"
        )
    dataset = read_annotations(first.annotations)
    chosen = choose_video(dataset)
    if options.figures is not None:
        chosen = select_video(dataset, options.figures, first.annotations)
    names = {category.id: category.name for category in dataset.categories}
    evaluations = {name: evaluate_files(first.annotations, run.results, identity=True) for name, run in runs.items()}
    followed = _follow(dataset, runs, evaluations)
    ranked = sorted(
        (video for video in dataset.videos if video.instances),
        key=lambda video: sum(by_run.share("right") for by_run in followed[video.id].values()),
    )
    films = _films(dataset, ranked[: options.videos], first.images, followed, names)
    page = render(
        names=[*runs],
        runs=[_describe(run) for run in runs.values()],
        numbers=number_tables(evaluations, {name: run.metrics for name, run in runs.items()}),
        breakdowns=breakdowns(evaluations, names),
        shares={name: shares(evaluation) for name, evaluation in evaluations.items()},
        states=[*STATES, "hidden"],
        meanings=MEANINGS,
        curves=curve_charts({name: run.curves() for name, run in runs.items()}),
        precision_recall=precision_recall_chart(evaluations),
        lines=[_line(video, followed[video.id]) for video in ranked[: len(films)]],
        left_out=len(dataset.videos) - len(films),
        films=films,
        figures=make_figures(dataset, chosen, first.images, [*runs.values()], followed[chosen.id]),
    )
    with replacing(output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return len(films)


def render(**content: object) -> str:
    """Fill the template; style and script come into the page itself."""
    folder = files("instanceformer.report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["label"] = lambda name: name.replace("_", " ")
    template = environment.from_string((folder / "page.html").read_text())
    inlined = {
        name: Markup((folder / file).read_text()) for name, file in (("style", "style.css"), ("script", "page.js"))
    }
    return template.render(version=__version__, **inlined, **content)


def _embedded(film: Film) -> Markup:
    """A film as JSON inside a script element, which a ``<`` could end."""
    return Markup(json.dumps(asdict(film), separators=(",", ":")).replace("<", "\\u003c"))


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or the whole path where two would have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _follow(
    dataset: VideoDataset, runs: dict[str, Run], evaluations: dict[str, VideoEvaluation]
) -> dict[int, dict[str, Followed]]:
    """For each video's id and each run, the tracks that count and what became of the instances."""
    followed: dict[int, dict[str, Followed]] = defaultdict(dict)
    for name, run in runs.items():
        identity = evaluations[name].identity
        assert identity is not None
        tracks: dict[int, list[Track]] = defaultdict(list)
        for track in iterate_results(run.results):
            tracks[track.video_id].append(track)
        for video in dataset.videos:
            followed[video.id][name] = Followed.of(video, tracks[video.id], identity.hota_score)
    return followed


def _films(
    dataset: VideoDataset,
    videos: Sequence[Video],
    images: Path,
    followed: dict[int, dict[str, Followed]],
    names: dict[int, str],
) -> list[Markup]:
    """The films of the videos as they are in the page, as many as the budget allows, and at least one."""
    films: list[Markup] = []
    for video in videos:
        film = _embedded(make_film(dataset, video, images, followed[video.id], names))
        if films and sum(map(len, films)) + len(film) > BUDGET:
            break
        films.append(film)
    return films


def _line(video: Video, followed: dict[str, Followed]) -> Line:
    counted = {state: [run.share(state) for run in followed.values()] for state in ("right", "captured", "lost")}
    by_run = [dict(zip(counted, values, strict=True)) for values in zip(*counted.values(), strict=True)]
    return Line(video_name(video), video.length, sum(not i.is_crowd for i in video.instances), by_run)


def _describe(run: Run) -> dict[str, str]:
    """What the head of the page says of a run."""
    tested = datetime.fromtimestamp(run.results.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {
        "folder": str(run.folder),
        "tested": tested,
        "annotations": str(run.annotations),
        "weights": run.settings.get("weights", "")[:12],
        "identity": run.settings.get("model.network.identity", "none"),
        "score": run.settings.get("model.inference.score", "mean"),
    }
