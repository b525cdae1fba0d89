"""A dataset of synthetic videos on disk, in YouTube-VIS format."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from instanceformer.data.synthetic.options import DEFAULT_OPTIONS, SPLITS, SyntheticOptions
from instanceformer.data.synthetic.statistics import SyntheticSummary, measure
from instanceformer.data.synthetic.video import Video, make_video


def synthesize(
    directory: Path, options: SyntheticOptions = DEFAULT_OPTIONS, overwrite: bool = False
) -> SyntheticSummary:
    """Write a dataset of moving, occluding shapes in YouTube-VIS format.

    The files are ``directory/{train,valid}.json`` and ``directory/JPEGImages/<video>/00000.jpg`` and on. Masks cover
    what is visible; a frame in which nothing of an instance is visible is null, and an instance that is visible in no
    frame is not annotated. Annotations carry OVIS's ``occlusion`` level of every frame, null like the mask. The JSON
    files are written last, so a run that was cut short leaves none.

    Args:
        directory: Where to write; made if it does not exist.
        options: What the videos show and how hard they are.
        overwrite: Replace a dataset that was made here before. Other files in the directory stay.

    Returns:
        The difficulty of both splits, measured on what was drawn.

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
        statistics[split] = measure(chosen)
        temporary = directory / f"{split}.json.partial"
        temporary.write_text(json.dumps(_dataset(chosen, options), separators=(",", ":")))
    for split in SPLITS:
        (directory / f"{split}.json.partial").replace(directory / f"{split}.json")
    return SyntheticSummary(**statistics)


def _dataset(videos: list[Video], options: SyntheticOptions) -> dict[str, Any]:
    annotations = [(number, each) for number, video in enumerate(videos, 1) for each in video.annotations]
    return {
        "info": {"description": f"synthetic moving shapes, seed {options.seed}"},
        "videos": [{"id": number, **video.entry} for number, video in enumerate(videos, 1)],
        "annotations": [{"id": i, "video_id": number, **each} for i, (number, each) in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(options.shapes, 1)],
    }
