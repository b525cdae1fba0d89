"""The true tracks that predictions are compared with."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instanceformer.data.annotations import OCCLUSION_LEVELS, Instance, Video, VideoDataset
from instanceformer.data.formats.youtube_vis import parse_annotations, read_annotations
from instanceformer.evaluation.overlap import decode_tracks, mean_visible


@dataclass(frozen=True)
class TrueTrack:
    """One annotated instance.

    Attributes:
        segmentations: compressed counts of the mask in each frame; None where the instance is not visible.
        is_crowd: whether this is a group of objects annotated as one.
        area: mean area in pixels over the frames where it is not zero; decides the size range.
        occlusion: degree of occlusion in [0, 0.75]; see ``occlusion_degree``.
    """

    segmentations: tuple[bytes | None, ...]
    is_crowd: bool
    area: float
    occlusion: float | None


@dataclass(frozen=True)
class GroundTruth:
    """What predictions are compared with.

    Attributes:
        videos: the videos, by id.
        category_ids: ids of all categories declared in the file.
        tracks: the true tracks, by (video id, category id), in file order.
        has_occlusion: whether any track has a degree of occlusion, as in OVIS.
    """

    videos: dict[int, Video]
    category_ids: frozenset[int]
    tracks: dict[tuple[int, int], list[TrueTrack]]
    has_occlusion: bool

    def long_videos(self, frames: int | None, ids: Collection[int] | None) -> frozenset[int] | None:
        """Ids of the long videos: those with more than ``frames`` frames, or ``ids``; None if both are None.

        Raises:
            ValueError: both are given, ``frames`` is negative, or an id belongs to no video.
        """
        if frames is None:
            if ids is not None and (unknown := sorted(set(ids) - self.videos.keys())):
                raise ValueError(f"long_videos: found {unknown[:5]}, expected ids of videos of the ground truth")
            return None if ids is None else frozenset(ids)
        if frames < 0:
            raise ValueError(f"long_frames: found {frames}, expected at least 0")
        if ids is not None:
            raise ValueError("found both long_frames and long_videos, expected one of them")
        return frozenset(video.id for video in self.videos.values() if video.length > frames)


def read_ground_truth(source: str | Path | Mapping[str, Any] | VideoDataset, name: str = "ground truth") -> GroundTruth:
    """Read ground truth from an annotation file, its parsed JSON, or a dataset from ``read_annotations``.

    The file's ``areas`` are used as they are; annotations without any get mask areas. The exception is a file in which
    more than nine in ten annotations with areas have those of their boxes, and some of these differ from the mask
    areas, as in OVIS. Then mask areas are used throughout, with a warning.

    Args:
        source: path of the file, its parsed JSON, or a dataset.
        name: name for messages, unless ``source`` is a path.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, has no annotations, or has an unknown occlusion level.
    """
    if isinstance(source, VideoDataset):
        dataset = source
    elif isinstance(source, Mapping):
        dataset = parse_annotations(source, name)
    else:
        name, dataset = str(source), read_annotations(source)
    if not dataset.is_annotated:
        raise ValueError(
            f"{name}: found no annotations, expected some; the files of a challenge's hidden validation videos have "
            "none, and only its server can evaluate results on them"
        )
    takes_masks = _has_box_areas(dataset)
    if takes_masks:
        warnings.warn(f"{name}: the areas are those of the boxes; those of the masks are used instead", stacklevel=2)
    tracks: dict[tuple[int, int], list[TrueTrack]] = {}
    for video in dataset.videos:
        for instance in video.instances:
            areas = _mask_areas(video, instance) if instance.areas is None or takes_masks else instance.areas
            try:
                occlusion = occlusion_degree(instance.occlusion or ())
            except ValueError as error:
                raise ValueError(f"{name}: occlusion of annotation {instance.id}: {error}") from error
            tracks.setdefault((video.id, instance.category_id), []).append(
                TrueTrack(instance.segmentations, instance.is_crowd, mean_visible(areas), occlusion)
            )
    return GroundTruth(
        videos={video.id: video for video in dataset.videos},
        category_ids=frozenset(category.id for category in dataset.categories),
        tracks=tracks,
        has_occlusion=any(track.occlusion is not None for cell in tracks.values() for track in cell),
    )


def occlusion_degree(labels: Sequence[str | None]) -> float | None:
    """How much a track is occluded, as in OVIS's evaluator: the mean level over the more occluded half of its frames.

    Args:
        labels: label of each frame, or None. The levels are 0 for ``no_occlusion``, 0.25 for ``slight_occlusion`` and
            0.75 for ``severe_occlusion``.

    Returns:
        The mean of the highest half of the levels, with the size of the half rounded up; None if there are no labels.

    Raises:
        ValueError: a label is unknown.
    """
    for label in labels:
        if label is not None and label not in OCCLUSION_LEVELS:
            raise ValueError(f"found {label!r}, expected {', '.join(OCCLUSION_LEVELS)} or null")
    levels = sorted((OCCLUSION_LEVELS[label] for label in labels if label is not None), reverse=True)
    half = levels[: (len(levels) + 1) // 2]
    return sum(half) / len(half) if half else None


def _has_box_areas(dataset: VideoDataset) -> bool:
    """Whether nearly all areas in a file are box areas, and some of these differ from the mask areas."""
    measured = [(video, instance) for video in dataset.videos for instance in video.instances if instance.areas]
    of_boxes = [(video, instance) for video, instance in measured if instance.has_box_areas]
    return len(of_boxes) > 0.9 * len(measured) and any(
        list(instance.areas or ()) != _mask_areas(video, instance) for video, instance in of_boxes
    )


def _mask_areas(video: Video, instance: Instance) -> list[float]:
    return [float(area) for area in decode_tracks([instance.segmentations], (video.height, video.width))[0].areas]
