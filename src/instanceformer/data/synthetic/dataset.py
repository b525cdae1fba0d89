"""Writes a dataset of synthetic videos in YouTube-VIS format and measures how hard it turned out."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from instanceformer.data.synthetic.options import DEFAULT_OPTIONS, SPLITS, SyntheticOptions
from instanceformer.data.synthetic.video import DrawnVideo, make_video


def synthesize(
    directory: Path, options: SyntheticOptions = DEFAULT_OPTIONS, overwrite: bool = False
) -> SyntheticSummary:
    """Write a dataset of moving, occluding shapes in YouTube-VIS format.

    The files are ``directory/{train,valid}.json`` and ``directory/JPEGImages/<video>/00000.jpg`` and so on. Masks cover
    only what is visible; they are null in frames where nothing of the instance is visible, and an instance that is
    never visible is not annotated. Annotations also have OVIS's ``occlusion`` level for every frame, null where the
    mask is. The JSON files are written last, so an interrupted run leaves none.

    Args:
        directory: Where to write; created if it does not exist.
        options: What the videos show and how hard they are.
        overwrite: Replace a dataset written here earlier. Other files in the directory are kept.

    Returns:
        How hard both splits are, measured on the videos.

    Raises:
        FileExistsError: If ``directory`` is not empty and ``overwrite`` is false.
        NotADirectoryError: If ``directory`` is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; expected a directory to write the dataset to")
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"{directory} is not empty; give another directory, or overwrite to replace its dataset"
            )
        for split in SPLITS:
            (directory / f"{split}.json").unlink(missing_ok=True)
            for video in directory.glob(f"JPEGImages/{split}_[0-9]*"):
                shutil.rmtree(video)

    counts = {"train": options.train_videos, "valid": options.valid_videos}
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    work = partial(make_video, directory, options)
    if options.workers == 1:
        videos = [work(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(options.workers) as pool:
            videos = list(pool.map(work, *zip(*jobs, strict=True), chunksize=4))

    statistics = {}
    for split in SPLITS:
        chosen = [video for video, (owner, _) in zip(videos, jobs, strict=True) if owner == split]
        statistics[split] = _measure(chosen)
        temporary = directory / f"{split}.json.partial"
        temporary.write_text(json.dumps(_dataset(chosen, options), separators=(",", ":")))
    for split in SPLITS:
        (directory / f"{split}.json.partial").replace(directory / f"{split}.json")
    return SyntheticSummary(**statistics)


def _dataset(videos: list[DrawnVideo], options: SyntheticOptions) -> dict[str, Any]:
    annotations = [(number, each) for number, video in enumerate(videos, 1) for each in video.annotations]
    return {
        "info": {"description": f"synthetic moving shapes, seed {options.seed}"},
        "videos": [{"id": number, **video.entry} for number, video in enumerate(videos, 1)],
        "annotations": [{"id": i, "video_id": number, **each} for i, (number, each) in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(options.shapes, 1)],
    }


@dataclass(frozen=True)
class SplitStatistics:
    """How hard one split turned out, measured on its masks.

    Attributes:
        videos: Number of videos.
        frames: Number of frames.
        instances: Number of annotated instances.
        hidden: Of the frames that show an instance, the fraction in which some instance is more than half hidden: its
            visible area is less than half of what it would be if no other instance were in the frame.
        absent_at_start: Fraction of instances not visible in the first frame.
        returning: Fraction of instances that become invisible, hidden or out of view, and visible again later.
        look_alikes: Fraction of instances with a look-alike among the annotated instances of their video.
    """

    videos: int
    frames: int
    instances: int
    hidden: float
    absent_at_start: float
    returning: float
    look_alikes: float


@dataclass(frozen=True)
class SyntheticSummary:
    """How hard both splits turned out; ``str()`` gives a table.

    Attributes:
        train: Statistics of the train split.
        valid: Statistics of the valid split.
    """

    train: SplitStatistics
    valid: SplitStatistics

    def __str__(self) -> str:
        labels = (
            "videos",
            "frames",
            "instances",
            "frames with an instance more than half hidden",
            "instances absent in the first frame",
            "instances that vanish and return",
            "instances with a look-alike",
        )
        columns = [
            [f"{value:.1%}" if isinstance(value, float) else str(value) for value in astuple(split)]
            for split in (self.train, self.valid)
        ]
        rows = [("", *SPLITS), *zip(labels, *columns, strict=True)]
        return "\n".join(f"{label:<46}{train:>8}{valid:>8}" for label, train, valid in rows)


def _measure(videos: list[DrawnVideo]) -> SplitStatistics:
    """Measure the videos of one split."""
    visible = [[area is not None for area in each["areas"]] for video in videos for each in video.annotations]
    returning = [sum(after > before for before, after in zip([False, *v], v, strict=False)) > 1 for v in visible]
    instances = max(len(visible), 1)
    return SplitStatistics(
        videos=len(videos),
        frames=sum(len(video.shown) for video in videos),
        instances=len(visible),
        hidden=float(sum(video.hidden.sum() for video in videos) / max(sum(video.shown.sum() for video in videos), 1)),
        absent_at_start=sum(not v[0] for v in visible) / instances,
        returning=sum(returning) / instances,
        look_alikes=sum(sum(video.look_alikes) for video in videos) / instances,
    )
