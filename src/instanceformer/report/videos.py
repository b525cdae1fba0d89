"""What the report shows of a video: its frames, the masks of the truth and of every run, and what went wrong where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from instanceformer.data.annotations import Video, VideoDataset
from instanceformer.data.clips import read_frames
from instanceformer.evaluation.decomposition import STATES, Fates, find_fates
from instanceformer.evaluation.overlap import compare_frames, distinct_tracks
from instanceformer.evaluation.results import RLE, Track, decode_mask, encode_mask
from instanceformer.inference.render import css_color, data_uri

LINES = 360
"""Frames with more rows than this are scaled down to it."""
HIDDEN = len(STATES)
"""The state of an instance in a frame in which it is not visible."""


@dataclass(frozen=True)
class Followed:
    """One run's tracks of a video, and what became of the instances by them.

    Attributes:
        tracks: the best track of each mask sequence with a score that counts, best first.
        fates: of the video's instances.
    """

    tracks: list[Track]
    fates: Fates

    @classmethod
    def of(cls, video: Video, tracks: Sequence[Track], threshold: float) -> Followed:
        """Follow the instances of a video by the tracks whose score is not below a threshold."""
        shown = [track for track in distinct_tracks(tracks) if track.score >= threshold]
        return cls(shown, find_fates(compare_frames(video, tracks), len(shown)))

    @property
    def numbers(self) -> list[int]:
        """A number for each track: that of the instance which it found, else one that no instance has."""
        fates = self.fates
        found = fates.first_frames < len(fates.states)
        owned = dict(zip(fates.owners[found].tolist(), (fates.instances[found] + 1).tolist(), strict=True))
        free = int(fates.instances.max(initial=-1)) + 2
        return [owned.get(index, free + index) for index in range(len(self.tracks))]

    def share(self, state: str) -> float:
        """The fraction of the visible (instance, frame) pairs in one of ``STATES``; 0 if nothing is visible."""
        fates = self.fates
        pairs = int(fates.visible.sum())
        return int(((fates.states == STATES.index(state)) & fates.visible).sum()) / pairs if pairs else 0.0


@dataclass(frozen=True)
class Shown:
    """An instance or a track as the page draws it.

    Attributes:
        number: its identity; an instance and the track that found it share one.
        name: of its class.
        color: of its number, as ``#rrggbb``.
        score: in [0, 1]; None for an instance.
        masks: compressed run lengths in each frame, at the size of the frames shown; None where there is none.
    """

    number: int
    name: str
    color: str
    score: float | None
    masks: list[str | None]


@dataclass(frozen=True)
class Mistake:
    """Frames in a row in which an instance was captured or lost.

    Attributes:
        number: of the instance.
        state: which of the two.
        first: frame in which it begins, counting from 0.
        text: what happened, as a sentence.
    """

    number: int
    state: str
    first: int
    text: str


@dataclass(frozen=True)
class Panel:
    """What the page shows of one run.

    Attributes:
        run: its name.
        tracks: in the order of their scores.
        rows: for each instance its number and its state in every frame, a digit each: the index in ``STATES``, or
            ``HIDDEN``.
        mistakes: in the order of the frames.
    """

    run: str
    tracks: list[Shown]
    rows: list[tuple[int, str]]
    mistakes: list[Mistake]


@dataclass(frozen=True)
class Film:
    """A video as the page plays it.

    Attributes:
        name: of the video.
        height: of the frames shown, in pixels.
        width: likewise.
        frames: WebP images as data URIs.
        instances: the ground truth.
        panels: one for each run.
    """

    name: str
    height: int
    width: int
    frames: list[str]
    instances: list[Shown]
    panels: list[Panel]


def video_name(video: Video) -> str:
    """The folder of a video's frames, else its id."""
    folder = Path(video.file_names[0]).parent.name if video.file_names else ""
    return folder or f"video {video.id}"


def shown_size(video: Video) -> tuple[int, int]:
    """(height, width) of the frames that the page shows."""
    height = min(video.height, LINES)
    return height, max(1, round(video.width * height / video.height))


def make_film(
    dataset: VideoDataset, video: Video, images: Path, followed: dict[str, Followed], names: dict[int, str]
) -> Film:
    """Collect what the page needs to play a video.

    Args:
        dataset: that the video belongs to.
        video: to show.
        images: folder that its file names are relative to.
        followed: its tracks, by the name of the run.
        names: of the categories, by id.

    Raises:
        ValueError: a frame cannot be read.
    """
    size = height, width = shown_size(video)
    frames = []
    for t in range(video.length):
        frame = read_frames(video, images, [t])[0].permute(1, 2, 0).numpy()
        if size != (video.height, video.width):
            frame = np.array(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))
        frames.append(data_uri(frame))
    codes = [
        [None if code is None else RLE(size=[video.height, video.width], counts=code.decode()) for code in masks]
        for masks in (instance.segmentations for instance in video.instances)
    ]
    instances = [
        _shown(i + 1, names[instance.category_id] + " (crowd)" * instance.is_crowd, None, masks, size)
        for i, (instance, masks) in enumerate(zip(video.instances, codes, strict=True))
    ]
    panels = []
    for run, by_run in followed.items():
        tracks = [
            _shown(number, names[track.category_id], round(track.score, 3), track.segmentations, size)
            for number, track in zip(by_run.numbers, by_run.tracks, strict=True)
        ]
        states = np.where(by_run.fates.visible, by_run.fates.states, HIDDEN).T
        numbers = (by_run.fates.instances + 1).tolist()
        rows = [(number, "".join(map(str, row))) for number, row in zip(numbers, states.tolist(), strict=True)]
        label = {instance.number: f"#{instance.number} {instance.name}" for instance in instances}
        mistakes = sorted(find_mistakes(by_run.fates, label), key=lambda mistake: mistake.first)
        panels.append(Panel(run, tracks, rows, mistakes))
    return Film(video_name(video), height, width, frames, instances, panels)


def _shown(number: int, name: str, score: float | None, masks: Sequence[RLE | None], size: tuple[int, int]) -> Shown:
    return Shown(
        number, name, css_color(number), score, [None if mask is None else _scaled(mask, size) for mask in masks]
    )


def _scaled(mask: RLE, size: tuple[int, int]) -> str | None:
    """The counts of a mask at another (height, width); None if nothing is left of it."""
    if tuple(mask["size"]) == size:
        return mask["counts"]
    resized = Image.fromarray(decode_mask(mask)).resize(size[::-1], Image.Resampling.NEAREST)
    code = encode_mask(np.array(resized))
    return code and code["counts"]


def find_mistakes(fates: Fates, label: dict[int, str]) -> Iterator[Mistake]:
    """The captured and lost stretches of all instances; ``label`` names each instance by its number."""
    for column, instance in enumerate((fates.instances + 1).tolist()):
        states = np.where(fates.visible[:, column], fates.states[:, column], HIDDEN)
        others = np.where(states == STATES.index("captured"), fates.covered[:, column], -1)
        frame = 0
        for (state, other), stretch in groupby(zip(states.tolist(), others.tolist(), strict=True)):
            first, frame = frame, frame + len(list(stretch))
            name = "hidden" if state == HIDDEN else STATES[state]
            if name not in ("captured", "lost"):
                continue
            frames = f"frame {first + 1}" if frame == first + 1 else f"frames {first + 1} to {frame}"
            what = "its track covers no instance"
            if name == "captured":
                what = f"its track is on {label[int(fates.instances[other]) + 1]}"
            yield Mistake(instance, name, first, f"{label[instance]} is {name} in {frames}: {what}")
